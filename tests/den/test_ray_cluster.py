"""`den predict --ray` and `den serve` on a Ray cluster of two nodes, one of which dies in the middle.

Both nodes run on this machine, each with processes and an object store of its own.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import den
from den.runs import bulk
from tests.served import encoded, free_port, photographs, store_run

pytestmark = pytest.mark.release
PICTURES = 160
COMMAND = """
import sys
from den import cli
from den.runs import bulk

bulk.PART = 4
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and a folder of pictures."""
    home = tmp_path_factory.mktemp("cluster")
    store_run(home / "run")
    (home / "new").mkdir()
    for k, picture in enumerate(photographs(PICTURES)):
        picture.save(home / "new" / f"{k:03d}.png")
    return home


@pytest.fixture
def cluster():
    """A cluster of one node; it ends with the test."""
    ray_cluster = pytest.importorskip("ray.cluster_utils", reason="ray is not installed (pip install '.[serve]')")
    found = ray_cluster.Cluster()
    found.add_node(num_cpus=1, include_dashboard=False)
    yield found
    found.shutdown()


def until(holds: Callable[[], bool], process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Wait until something holds, while a process runs."""
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def metrics(port: int) -> bytes:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        return reply.read()
    return b""


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("part-?????.jsonl")) for line in path.open()]


def test_predictions_over_two_nodes_are_whole_when_one_of_them_dies(cluster, place):
    second, out = cluster.add_node(num_cpus=1), place / "out"
    cluster.wait_for_nodes()
    options = ["predict", str(place / "run"), str(place / "new"), "--device", "cpu", "--out", str(out)]
    on_both = [*options, "--ray", "--ray-address", cluster.address, "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *on_both])
    until(lambda: len(list(out.glob("part-*.jsonl"))) >= 6, process)
    cluster.remove_node(second, allow_graceful=False)
    assert len(list(out.glob("part-*.jsonl"))) < PICTURES // 4, "it was done before the node died"
    assert process.wait(300) == 0
    found = rows_of(out)
    offline = den.load(place / "run", device="cpu").predict(sorted((place / "new").iterdir()))
    assert [(row["image"], row["task"], row["label"]) for row in found] == [
        (each.image, each.task, each.label) for each in offline
    ]
    assert not list(out.glob("*.broken.jsonl"))
    assert json.loads((out / bulk.JOB).read_text())["size"] == 4


def test_a_service_on_two_nodes_goes_on_when_one_of_them_dies(cluster, place):
    """Only connections that the dead node held break, at once; a client that asks again is answered."""
    second, port = cluster.add_node(num_cpus=1), free_port()
    cluster.wait_for_nodes()
    options = ["--ray-address", cluster.address, "--replicas", "2", "--threads", "1", "--port", str(port)]
    command = [sys.executable, "-m", "den", "serve", str(place / "run"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("http://" in line for line in process.stdout)
    picture = photographs(1)[0]
    body, offline = encoded(picture), den.load(place / "run", device="cpu").predict(picture)
    answers: list[list[dict]] = []
    broken: list[float] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "image/png"})
            try:
                with urllib.request.urlopen(asked, timeout=60) as reply:
                    answers.append(json.load(reply)["predictions"])
            except OSError:  # a status that is none of 2xx is one, too
                broken.append(time.monotonic())

    clients = [threading.Thread(target=client) for _ in range(8)]
    for each in clients:
        each.start()
    try:
        until(lambda: len(answers) > 200, process)
        died = time.monotonic()
        cluster.remove_node(second, allow_graceful=False)
        before = len(answers)
        until(lambda: time.monotonic() > died + 15 and len(answers) > before + 200, process)
        until(lambda: b'den_queue_length{replica="' in metrics(port), process)  # those of all, wherever their board was
    finally:
        stop.set()
        for each in clients:
            each.join()
    print(f"{len(answers)} answers, {len(broken)} broken connections, {before} answers before the node died")
    assert len(broken) <= 4 * len(clients)
    assert all(died <= when < died + 10 for when in broken)
    wanted = [(each.label, list(each.levels)) for each in offline]
    assert all([(each["label"], each["levels"]) for each in answer] == wanted for answer in answers)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
