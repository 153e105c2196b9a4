"""`den serve` without Ray: its answers, batches of mixed tasks, metrics, page; networks of every kind of folder."""

import asyncio
import base64
import contextlib
import io
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import den
import den_kernels
from den.data.decode import squared
from den.data.images import Kept
from den.inference.pretrained import PACKAGES
from den.runs.predict import Predictor, network_inputs
from den.serve.network import Item, open_network
from tests.served import KEPT, TASKS, encoded, photographs, store_run, until
from tests.stand_ins import PlainBasicBlock

pytest.importorskip("starlette", reason="starlette is not installed (pip install '.[test]')")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (pip install '.[test]')")
testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed (pip install '.[test]')")

from den.serve.app import create_app  # noqa: E402
from den.serve.metrics import merged  # noqa: E402

PETS, DIGITS = (task.name for task in TASKS)
PNG = {"Content-Type": "image/png"}
GOOD = encoded(photographs(1)[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return store_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def network(run):
    return open_network(run, device="cpu")


@pytest.fixture(scope="module")
def offline(run) -> Predictor:
    return den.load(run, device="cpu")


@pytest.fixture
def client(network):
    with testclient.TestClient(create_app(network), raise_server_exceptions=False) as client:
        yield client


def same(got: dict, wanted: den.Prediction) -> None:
    """The answer is the prediction that the run gives offline."""
    assert (got["task"], got["label"], tuple(got["levels"])) == (wanted.task, wanted.label, wanted.levels)
    assert got["flops"] == wanted.flops
    assert got["flops_ratio"] == pytest.approx(wanted.flops_ratio)
    assert [name for name, _ in got["top"]] == [name for name, _ in wanted.top]
    assert [chance for _, chance in got["top"]] == pytest.approx([chance for _, chance in wanted.top], abs=1e-5)
    assert got["confidence"] == got["top"][0][1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_answered_for_every_task_or_one_as_offline(client, offline, tmp_path, kind):
    for k, picture in enumerate(photographs(3)):
        body = encoded(picture, kind)
        (path := tmp_path / f"{k}").write_bytes(body)
        reply = client.post("/predict", content=body, headers={"Content-Type": f"image/{kind.lower()}"})
        assert reply.status_code == 200
        for got, wanted in zip(reply.json()["predictions"], offline.predict(path), strict=True):
            same(got, wanted)
        own = client.post("/predict/digits?top=2", content=body, headers={"Content-Type": "application/octet-stream"})
        [got] = own.json()["predictions"]
        same(got, *offline.predict(path, "digits", top=2))
    assert reply.json()["batch"] == 2
    assert set(reply.json()["milliseconds"]) == {"all", "queue", "batch"}


@pytest.mark.parametrize("name", [PETS, PETS.partition("@")[0], "pets"])
@pytest.mark.parametrize("where", ["address", "parameter", "JSON", "JSON and address"])
def test_a_task_is_named_in_the_address_a_parameter_or_json(client, name, where):
    [picture] = photographs(1)
    body = encoded(picture)
    values = {"image": base64.b64encode(body).decode(), "top": 1} | ({"task": name} if "JSON" in where else {})
    address = (
        f"/predict/{name}" if "address" in where else f"/predict?task={name}" if where == "parameter" else "/predict"
    )
    given = {"json": values} if "JSON" in where else {"content": body, "headers": PNG}
    reply = client.post(address, **given)
    assert [each["task"] for each in reply.json()["predictions"]] == [PETS], reply.text


def test_requests_at_the_same_time_are_one_batch_of_mixed_tasks(network, offline, tmp_path, monkeypatch):
    """The first batch is held until all others wait."""
    batches, together = [], threading.Event()
    compute = type(network).predictions

    def held(self, items):
        batches.append([item.task for item in items])
        if len(batches) == 1:
            assert together.wait(20)
        return compute(self, items)

    monkeypatch.setattr(type(network), "predictions", held)
    app = create_app(network)
    paths = []
    for k, picture in enumerate(photographs(9)):
        paths.append(tmp_path / f"{k}.png")
        picture.save(paths[-1])
    replies: dict = {}
    with testclient.TestClient(app) as client:

        def send(k: int) -> None:
            task = (DIGITS, "pets", None)[k % 3]
            address = "/predict" if task is None else f"/predict/{task}"
            replies[k] = client.post(address, content=paths[k].read_bytes(), headers=PNG)

        threads = [threading.Thread(target=send, args=(k,)) for k in range(9)]
        threads[0].start()
        until(lambda: len(batches) == 1)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(app.state.service.batcher) == 11)
        together.set()
        for thread in threads:
            thread.join()
    assert len(batches) == 2
    assert sorted(batches[1]) == [0] * 6 + [1] * 5
    for k, reply in replies.items():
        task = (DIGITS, PETS, None)[k % 3]
        for got, wanted in zip(reply.json()["predictions"], offline.predict(paths[k], task), strict=True):
            same(got, wanted)


def test_a_batch_waits_for_more_only_where_it_is_told_to():
    from den.serve.batcher import Batcher

    async def sizes(wait: float, most: int) -> list[int]:
        batcher = Batcher(lambda items: items, most, wait)
        first = asyncio.create_task(batcher([0]))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(batcher([1]))
        answers = [*await first, *await second]
        await batcher.close()
        assert [answer.value for answer in answers] == [0, 1]
        return [answer.batch for answer in answers]

    assert asyncio.run(sizes(0.0, 8)) == [1, 1]
    assert asyncio.run(sizes(5.0, 2)) == [2, 2]


def test_a_batch_that_fails_is_an_error_of_its_requests_alone(client, network, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(network), "predictions", lambda self, items: 1 / 0)
        reply = client.post("/predict", content=GOOD, headers=PNG)
    assert (reply.status_code, "network failed" in reply.json()["error"]) == (500, True)
    assert "division" not in reply.text
    assert client.post("/predict", content=GOOD, headers=PNG).status_code == 200


def test_metrics_tell_time_structures_savings_and_queue(client):
    from prometheus_client.parser import text_string_to_metric_families

    before = client.get("/metrics")
    assert before.headers["content-type"].startswith("text/plain")
    [reply] = [client.post("/predict", content=GOOD, headers=PNG).json()]
    client.post("/predict/cats", content=GOOD, headers=PNG)
    text = client.get("/metrics").text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    samples = {(sample.name, *sorted(sample.labels.values())): sample.value for sample in found}
    assert samples["den_requests_total", "404"] == samples["den_batch_milliseconds_count",] == 1
    assert samples["den_images_total", PETS] == samples["den_images_total", DIGITS] == 1
    assert samples["den_queue_length",] == samples["den_requests_held",] == 0
    assert samples["den_batch_images_sum",] == samples["den_queue_milliseconds_count",] == 2
    for each in reply["predictions"]:
        assert samples["den_flops_total", each["task"]] == each["flops"]
        for block, level in enumerate(each["levels"]):
            assert samples["den_levels_total", *sorted((each["task"], str(block), str(level)))] == 1
    ratio = sum(each["flops_ratio"] for each in reply["predictions"]) / 2
    assert samples["den_flops_saved_ratio",] == pytest.approx(1 - ratio)
    both = merged({"a": text, "b": text})
    names = [f.name for f in text_string_to_metric_families(both)]
    assert len(names) == len(set(names))
    assert 'den_images_total{replica="b",task="digits"} 1.0' in both


def test_tasks_health_and_a_page_that_asks_nobody_else(client):
    known = client.get("/tasks").json()
    assert [task["name"] for task in known["tasks"]] == [PETS, DIGITS]
    assert known["tasks"][0]["classes"] == list(KEPT[PETS].class_names)
    assert (known["blocks"], known["levels"]) == (3, 4)
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=\"|@import|innerHTML", page.text)
    assert client.get("/predict").status_code == 405


def test_an_engine_folder_is_served_with_its_operating_point(run, offline, tmp_path):
    engine = offline.engine(device="cpu", levels=[1, 2, 1])
    den.Engine(engine.model, device="cpu").save_pretrained(tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"config.json must say how pictures become images of digits, folder:pictures/pets"
    ):
        open_network(tmp_path / "bare", device="cpu")
    engine.save_pretrained(tmp_path / "engine")
    den.Engine.from_pretrained(tmp_path / "engine", device="cpu").save_pretrained(tmp_path / "again")
    served = open_network(tmp_path / "again", device="cpu")
    found = served.predictions(served.decoded(GOOD, (1, 0), 2, 10**6))
    assert [(each.task, each.levels, len(each.top)) for each in found] == [(DIGITS, (1, 2, 1), 2), (PETS, (1, 2, 1), 2)]


@pytest.mark.parametrize("mode", ["dense", "nestednet"])
def test_runs_of_other_methods_answer_by_their_own_rule(tmp_path, mode):
    folder = store_run(tmp_path / "run", mode=mode)
    network, offline = open_network(folder, device="cpu"), den.load(folder, device="cpu")
    picture = photographs(1)[0]
    found = network.predictions([Item(0, picture.resize((16, 16)).convert("RGB"))])
    assert found[0].levels == offline.predict(picture, PETS)[0].levels


def plain(name: str = "", **settings: int) -> nn.Module:
    """A model of somebody else, for images of 12 pixels."""
    blocks = [PlainBasicBlock(16, 16), PlainBasicBlock(16, 16)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *blocks, *tail).eval()


@pytest.fixture
def converted(monkeypatch):
    monkeypatch.setitem(PACKAGES, "timm", plain)
    model, example = plain(), torch.zeros(1, 3, 12, 12)
    den_kernels.convert(model, 2, example=example)
    return den.Engine(model, device="cpu", levels=[1, 2], example=example)


def test_a_converted_model_is_the_task_images(converted, tmp_path):
    kept = Kept((0.5,) * 3, (0.2,) * 3)
    served = open_network(converted.save_pretrained(tmp_path, architecture="timm/own", kept=kept), device="cpu")
    assert [(task.name, task.classes, task.size) for task in served.tasks] == [("images", 7, 12)]
    with testclient.TestClient(create_app(served)) as client:
        [found] = client.post("/predict/images", content=GOOD, headers=PNG).json()["predictions"]
    assert (found["levels"], len(found["top"])) == ([1, 2], 5)
    assert 0 < found["flops_ratio"] < 1
    square = network_inputs([squared(io.BytesIO(GOOD), 12)], served.tasks[0], kept)
    chances = converted(square).softmax(-1).topk(5).values[0].tolist()
    assert [chance for _, chance in found["top"]] == pytest.approx(chances, abs=1e-5)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (Kept((0.5,), (0.2,)), "with a mean for each, got classification, 3 channels, 1 means, 7 classes, 0 names"),
        (Kept((0.5,) * 3, (0.2,) * 3, ("a", "b")), "3 means, 7 classes, 2 names"),
        (Kept((0.5,) * 3, (0.0,) * 3), "must hold a den.data.images.Kept of mean and std for images"),
        ({"images": (0.5, 0.2)}, "must hold a den.data.images.Kept of mean and std for images"),
        ({"cats": Kept((0.5,), (0.2,))}, "kept must be of images, got 'cats'"),
        (None, "must say how pictures become images of images, got nothing"),
    ],
)
def test_facts_of_pictures_that_do_not_fit_are_told(converted, tmp_path, kept, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        open_network(converted.save_pretrained(tmp_path, architecture="timm/own", kept=kept), device="cpu")


def test_the_programs_of_the_page_run(run, client, tmp_path, monkeypatch, capsys):
    """The second one with the service that it asks in this process."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text()
    save, ask, build = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "flowers").symlink_to(run)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.png").write_bytes(GOOD)

    def urlopen(request):
        reply = client.post(request.selector, content=request.data, headers=dict(request.headers))
        return contextlib.closing(io.BytesIO(reply.content))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    exec(save, {})
    assert open_network(Path("engines/flowers"), device="cpu").engine.point.structure.tolist() == [2, 1, 2]
    exec(ask, {})
    assert len(capsys.readouterr().out.splitlines()) == len(TASKS)
    exec(build, names := {})
    assert testclient.TestClient(names["app"]).get("/health").text == "ok"
