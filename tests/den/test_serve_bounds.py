"""`den serve` without Ray: what it refuses and how it tells it; its bounds in size, time and number; its end."""

import asyncio
import base64
import re
import struct
import threading
import zlib

import pytest

from den.serve.network import open_network
from den.serve.settings import Limits, Serve
from tests.served import TASKS, encoded, photographs, store_run, until

pytest.importorskip("starlette", reason="starlette is not installed (pip install '.[test]')")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (pip install '.[test]')")
testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed (pip install '.[test]')")

from den.serve.app import create_app  # noqa: E402

PETS = TASKS[0].name
PNG = {"Content-Type": "image/png"}
GOOD = encoded(photographs(1)[0])


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return open_network(store_run(tmp_path_factory.mktemp("serve") / "run"), device="cpu")


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of a few bytes whose header tells of many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


B64 = base64.b64encode(GOOD).decode()
BAD = {
    "no picture": ("/predict", GOOD[::-1], "image/png", 422, "image must be a picture that can be read"),
    "half a picture": ("/predict", GOOD[: len(GOOD) // 2], "image/png", 422, "image must be a picture that can"),
    "nothing": ("/predict", b"", "image/png", 422, "image must be a picture that can be read"),
    "a program of EPS": ("/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/eps", 422, "no file of JPEG, PNG"),
    "too many bytes": ("/predict", b"x" * 2_000_001, "image/png", 413, "body must have at most 2,000,000 bytes"),
    "too many pixels": ("/predict", bomb(2_000, 1_000), "image/png", 413, "at most 1,000,000 pixels, got 2000 x 1000"),
    "a bomb": ("/predict", bomb(), "image/png", 413, "image must have at most 1,000,000 pixels"),
    "unknown task": ("/predict/cats", GOOD, "image/png", 404, f"task must be one of {PETS}, digits, got 'cats'"),
    "unknown task in JSON": ("/predict", {"image": B64, "task": "cats"}, None, 404, "got 'cats'"),
    "two tasks": ("/predict/pets", {"image": B64, "task": "digits"}, None, 422, "task must be that of the address"),
    "task of a list": ("/predict", {"image": B64, "task": ["digits"]}, None, 422, "task must be a name, got list"),
    "wrong type": ("/predict", b"a=1", "application/x-www-form-urlencoded", 415, "Content-Type must be image/*"),
    "no type": ("/predict", GOOD, "", 415, "got none"),
    "no JSON": ("/predict", b"{", "application/json", 400, "body must be JSON"),
    "deep JSON": ("/predict", b"[" * 100_000, "application/json", 400, "body must be JSON"),
    "a list": ("/predict", [B64], None, 422, 'body must be {"image": BASE64}'),
    "unknown key": ("/predict", {"image": B64, "tsak": "digits"}, None, 422, "got 'image', 'tsak'"),
    "no image": ("/predict", {"task": "digits"}, None, 422, 'body must be {"image": BASE64}'),
    "no base64": ("/predict", {"image": "***"}, None, 422, "image must be base64"),
    "base64 of nothing": ("/predict", {"image": "aaaa"}, None, 422, "image must be a picture that can be read"),
    "top 0": ("/predict?top=0", GOOD, "image/png", 422, "top must be a whole number in 1..1000, got '0'"),
    "top of words": ("/predict?top=many", GOOD, "image/png", 422, "got 'many'"),
    "top of true": ("/predict", {"image": B64, "top": True}, None, 422, "got 'True'"),
    "unknown parameter": ("/predict?levels=3", GOOD, "image/png", 422, "parameters must be among task and top"),
    "unknown address": ("/classify", GOOD, "image/png", 404, "Not Found"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_as_json_and_leave_nothing_behind(network, name):
    address, body, kind, status, words = BAD[name]
    app = create_app(network, Limits(body_mb=2, megapixels=1))
    with testclient.TestClient(app) as client:
        given = {"content": body, "headers": {"Content-Type": kind}} if isinstance(body, bytes) else {"json": body}
        reply = client.post(address, **given)
        assert (reply.status_code, list(reply.json())) == (status, ["error"])
        assert words in reply.json()["error"]
        assert not re.search(r"Traceback|File \"|0x[0-9a-f]{6}", reply.text)
        assert app.state.service.held == len(app.state.service.batcher) == 0
        assert client.post("/predict", content=GOOD, headers=PNG).status_code == 200


def test_a_body_without_a_length_is_read_no_further_than_its_bound(network):
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield b"x" * 100_000

    with testclient.TestClient(create_app(network, Limits(body_mb=1))) as client:
        # the client hands over all of a body at once, so that the end stands here; the server must not read to it
        body = (part for part, _ in zip(endless(), range(40), strict=False))
        assert client.post("/predict", content=body, headers=PNG).status_code == 413
    assert asyncio.run(parts_read(create_app(network, Limits(body_mb=1)))) <= 11


async def parts_read(app) -> int:
    """The number of parts of 100,000 bytes that the application takes of an endless body."""
    taken, statuses = 0, []

    async def receive():
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    async def send(message):
        statuses.append(message.get("status"))

    await app(scope("/predict"), receive, send)
    assert statuses[0] == 413
    return taken


def scope(path: str) -> dict:
    head = {"type": "http", "http_version": "1.1", "scheme": "http", "method": "POST", "root_path": ""}
    return head | {"path": path, "query_string": b"", "headers": [(b"content-type", b"image/png")]}


def test_a_body_that_does_not_come_is_given_up(network):
    async def stalled() -> int:
        statuses = []

        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            statuses.append(message.get("status"))

        app = create_app(network, Limits(seconds=0.05))
        await app(scope("/predict"), receive, send)
        assert app.state.service.held == 0
        return statuses[0]

    assert asyncio.run(stalled()) == 408


@pytest.fixture
def held_back(network, monkeypatch):
    """The network computes when the event is set; batches that began."""
    go, began = threading.Event(), []
    compute = type(network).predictions

    def wait(self, items):
        began.append(len(items))
        assert go.wait(20)
        return compute(self, items)

    monkeypatch.setattr(type(network), "predictions", wait)
    yield go, began
    go.set()


def test_beyond_the_bound_of_the_queue_requests_are_sent_away_and_all_others_answered(network, held_back):
    go, _ = held_back
    app, statuses = create_app(network, Limits(queue=3)), []
    with testclient.TestClient(app) as client:
        threads = [
            threading.Thread(
                target=lambda: statuses.append(client.post("/predict", content=GOOD, headers=PNG).status_code)
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: app.state.service.held == 3)
        away = client.post("/predict", content=GOOD, headers=PNG)
        assert (away.status_code, away.headers["retry-after"]) == (503, "1")
        assert "queue of 3 requests is full" in away.json()["error"]
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        go.set()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 3


def test_what_takes_too_long_is_told_and_not_computed(network, held_back):
    go, began = held_back
    app = create_app(network, Limits(seconds=0.3))
    with testclient.TestClient(app) as client:
        first = threading.Thread(target=client.post, args=("/predict",), kwargs={"content": GOOD, "headers": PNG})
        first.start()
        until(lambda: len(began) == 1)
        late = client.post("/predict", content=GOOD, headers=PNG)
        assert (late.status_code, late.headers["retry-after"]) == (504, "1")
        first.join()
        go.set()
        assert client.post("/predict/digits", content=GOOD, headers=PNG).status_code == 200
    assert began == [2, 1]  # the second request's two images were dropped


def test_what_was_accepted_is_answered_at_shutdown(network, held_back):
    go, began = held_back

    async def scenario() -> list:
        app = create_app(network)
        service = app.state.service
        items = network.decoded(GOOD, (0, 1), 5, 10**6)
        asked = [asyncio.create_task(service.batcher(items)) for _ in range(40)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(service.close())
        while not began:
            await asyncio.sleep(0.001)
        assert not closing.done()
        go.set()
        await closing
        return await asyncio.gather(*asked)

    assert [len(each) for each in asyncio.run(scenario())] == [2] * 40
    assert began == [64, 16]


def test_the_board_knows_when_every_replica_has_learnt_that_the_service_ends_and_holds_nothing(monkeypatch):
    from den.serve import board

    clock = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    found = board.Board()
    assert not found.report("a", "", 3)
    assert not found.report("b", "", 0)
    found.end()
    assert not found.idle()
    clock[0] += 0.1
    assert found.report("b", "", 0)  # it may have taken one before it learnt
    assert found.report("a", "", 1)
    clock[0] += 1.0
    assert found.report("b", "", 0)
    assert not found.idle()
    assert found.report("a", "", 2)
    assert not found.idle()
    assert found.report("a", "", 0)
    assert found.idle()
    found.report("c", "", 5)
    assert not found.idle()
    clock[0] += board.LOST
    assert found.idle()  # it was killed


def test_a_service_that_ends_takes_nothing_new(network):
    app = create_app(network)
    with testclient.TestClient(app) as client:
        app.state.service.ending = True
        away = client.post("/predict", content=GOOD, headers=PNG)
        assert (away.status_code, away.json()["error"]) == (503, "the service ends")
        assert client.get("/health").status_code == 503
        assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"port": 0}, "serve: port must be in 1..65535, got 0"),
        ({"replicas": 0}, "serve: replicas must be in 1..10000, got 0"),
        ({"limits": Limits(queue=0)}, "serve: queue must be in 1..1000000, got 0"),
        ({"limits": Limits(seconds=0.0)}, "serve: seconds must be above 0"),
        ({"proxy": "haproxy", "ray_address": "auto"}, "serve: proxy must be auto or ray with a ray_address"),
    ],
)
def test_settings_out_of_range_are_told(tmp_path, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Serve(tmp_path, **change).check()
