"""Networks that several threads use at once."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from den import Task, create_model
from den.dag import DagNetwork
from den.dag.model_config import DagConfig
from den.nn.blocks import BottleneckBlock, ElasticBlock
from den.nn.blocks.bottleneck import BottleneckShape
from den_kernels import RoutingPlan


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads take turns after almost every instruction."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def side_by_side(work: Callable[[], object], change: Callable[[], object], workers: int = 4) -> list[Exception]:
    """Runs `work` again and again in threads of its own, `change` once meanwhile; what the threads raised."""
    failures, stop, ready = [], threading.Event(), threading.Barrier(workers + 1)

    def loop() -> None:
        torch.set_num_threads(1)
        ready.wait()
        while not stop.is_set():
            try:
                work()
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=loop) for _ in range(workers)]
    for thread in threads:
        thread.start()
    ready.wait()
    change()
    for _ in range(3):
        work()
    stop.set()
    for thread in threads:
        thread.join()
    return failures


def blocks() -> list[nn.Module]:
    return [ElasticBlock(16, 16, 3), BottleneckBlock(BottleneckShape(32, 32, 32, 6, 1), 3)]


@pytest.mark.parametrize("grad", [False, True], ids=["folded", "with gradients"])
@pytest.mark.parametrize("kind", [0, 1], ids=["residual", "bottleneck"])
@pytest.mark.parametrize("seed", range(4))
def test_a_block_is_frozen_while_others_run_it(kind, grad, seed, busy_switching):
    torch.manual_seed(seed)
    block = blocks()[kind].eval()
    channels = block.conv1.in_channels
    x = torch.randn(3, channels, 6, 6).contiguous(memory_format=torch.channels_last)
    route = RoutingPlan.from_levels(torch.tensor([[0], [1], [2]]), 2)[0]
    with torch.no_grad():
        expected = block(x, route)

    def run() -> None:
        with torch.set_grad_enabled(grad):
            try:
                y = block(x, route)
            except ValueError as error:
                if "frozen" not in str(error):  # with gradients a frozen block refuses
                    raise
                return
        torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-5)

    failures = side_by_side(run, block.freeze)
    assert not failures, failures[0]


def test_a_network_is_frozen_while_others_run_it(busy_switching):
    model = create_model("wrn8_1", [Task("a", 10, 16)], levels=4, trunk_size=8).eval()
    nn.init.normal_(model.selector.heads[0].weight)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, "a")

    @torch.no_grad()
    def run() -> None:
        torch.testing.assert_close(model(x, "a"), expected, rtol=1e-4, atol=1e-5)

    failures = side_by_side(run, model.freeze)
    assert not failures, failures[0]


def test_a_dag_network_runs_batches_of_different_tasks_at_once(busy_switching):
    tasks = [Task(name, 3, 8) for name in "ab"]
    network = DagNetwork(DagConfig(tuple(tasks), states=4, flow=2, channels=8)).eval()
    x, calls = torch.randn(2, 3, 8, 8), iter(range(10**9))
    with torch.no_grad():
        expected = [network(x, task) for task in "ab"]

    @torch.no_grad()
    def run() -> None:
        which = next(calls) % 2
        assert torch.equal(network(x, "ab"[which]), expected[which])

    failures = side_by_side(run, lambda: [run() for _ in range(50)])
    assert not failures, failures[0]
