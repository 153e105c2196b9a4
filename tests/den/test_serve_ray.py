"""`den serve` as a process on Ray: replicas, metrics of all of them, its page in a browser, its end under load."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

import den
from den import cli
from tests.served import TASKS, encoded, free_port, photographs, store_run

PETS, DIGITS = (task.name for task in TASKS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return store_run(tmp_path_factory.mktemp("ray") / "run")


@pytest.mark.parametrize("package", ["ray", "starlette", "prometheus_client"])
def test_a_missing_package_is_told_with_the_extra(run, monkeypatch, capsys, package):
    from den.serve import command

    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else object())
    assert cli.main(["serve", str(run)]) == 2
    told = capsys.readouterr().err
    assert told == (
        f"den: error: den serve: needs the extra `serve`: pip install 'den-kernels[serve]' ({package} is not there)\n"
    )


@pytest.fixture(scope="module", params=["haproxy", "ray"])
def started(run, request):
    """The address and the process of a service of two replicas."""
    pytest.importorskip("ray.serve", reason="ray is not installed (pip install '.[serve]')")
    port = free_port()
    options = ["--port", str(port), "--replicas", "2", "--threads", "1", "--proxy", request.param]
    command = [sys.executable, "-m", "den", "serve", str(run), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    lines = iter(process.stdout.readline, "")
    assert any(address in line for line in lines), "the service did not start"
    yield address, process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait(120)


def ask(address: str, body: bytes | None = None, kind: str = "image/png") -> tuple[int, str]:
    """The status and the text of an answer."""
    request = urllib.request.Request(address, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def told_before_it_is_sent(address: str, size: int) -> int:
    """The status that answers the head of a request alone, which says how long its body would be."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    with contextlib.closing(connection):
        return connection.getresponse().status


@pytest.mark.release
def test_replicas_answer_as_offline_and_tell_their_metrics_in_one_place(started, run, tmp_path):
    address, _ = started
    offline = den.load(run, device="cpu")
    for k, picture in enumerate(photographs(8)):
        picture.save(path := tmp_path / f"{k}.png")
        status, text = ask(f"{address}/predict", path.read_bytes())
        assert status == 200
        for got, wanted in zip(json.loads(text)["predictions"], offline.predict(path), strict=True):
            assert (got["label"], tuple(got["levels"])) == (wanted.label, wanted.levels)
            assert got["confidence"] == pytest.approx(wanted.confidence, abs=1e-5)
    assert ask(f"{address}/predict/cats", b"x")[0] == 404
    assert ask(f"{address}/predict", b"x")[0] == 422
    assert told_before_it_is_sent(address, 17_000_000) == 413
    assert ask(f"{address}/predict", b"x", "text/plain")[0] == 415
    assert ask(f"{address}/health") == (200, "ok")
    time.sleep(1.5)
    metrics = ask(f"{address}/metrics")[1]
    assert len(set(re.findall(r'den_queue_length\{replica="(\w+)"\} 0\.0', metrics))) == 2
    answered = re.findall(rf'^den_images_total\{{.*task="{DIGITS}"\}} (\S+)$', metrics, re.MULTILINE)
    assert sum(map(float, answered)) == 8


@pytest.mark.release
def test_the_page_shows_a_picture_its_answer_its_structure_and_its_cost(started, run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    address, _ = started
    photographs(3)[2].resize((300, 200)).save(path := tmp_path / "photo.jpg")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    wanted = den.load(run, device="cpu").predict(path)
    with playwright.sync_playwright() as starter:
        page = starter.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.extend([] if address in request.url else [request.url]))
        page.goto(address)
        page.set_input_files("#file", path)
        page.wait_for_selector("article")
        assert [title.partition(":")[2] for title in page.locator("h2").all_inner_texts()] == [
            f"{each.task}: {each.label}".partition(":")[2] for each in wanted
        ]
        bars = [[bar.inner_text() for bar in card.locator(".block").all()] for card in page.locator("article").all()]
        assert bars == [[str(level) for level in each.levels] for each in wanted]
        costs = page.locator(".cost").all_inner_texts()
        assert [f"{each.flops / 1e6:.2f} MFLOP" in cost for each, cost in zip(wanted, costs, strict=True)] == [True] * 2
        assert re.match(r"\d+\.\d ms: ", page.inner_text("#time"))
        assert "<b>newt</b>" in page.inner_text("#answers")  # a name is text, whatever it holds
        page.screenshot(path=os.environ.get("DEN_SCREENSHOT", tmp_path / "page.png"), full_page=True)
        page.select_option("#task", DIGITS)
        page.locator("article").nth(1).wait_for(state="detached")
        page.set_input_files("#file", tmp_path / "broken.png")
        page.wait_for_selector("#error:not([hidden])")
        assert "422: image must be a picture that can be read" in page.inner_text("#error")
    assert [fault for fault in faults if not fault.startswith("blob:")] == []


@pytest.mark.release
def test_at_its_end_what_was_accepted_is_answered_and_the_rest_is_told(started):
    """Connections break only after the service has said that it ends."""
    address, process = started
    body, stop = encoded(photographs(1)[0]), threading.Event()
    seen: list[list[int]] = [[] for _ in range(8)]

    def client(own: list[int]) -> None:
        while not stop.is_set():
            try:
                own.append(ask(f"{address}/predict", body)[0])
            except OSError:
                own.append(0)
                return

    threads = [threading.Thread(target=client, args=(own,)) for own in seen]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    stop.set()
    for thread in threads:
        thread.join()
    for own in seen:  # replicas learn of the end one after the other: 503 and 200 may alternate
        gone = next((k for k, status in enumerate(own) if status in (0, 404)), len(own))
        assert set(own[:gone]) <= {200, 503}, own
        assert own[0] == 200
        assert gone == len(own) or own[gone - 1] == 503, own
        assert 200 not in own[gone:], own
    assert any(503 in own for own in seen)
