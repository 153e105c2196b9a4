"""How `benchmarks` takes times on a GPU, and with which precision: on a simulated one."""

import pytest
import torch

from benchmarks import gpu_clock
from benchmarks.gpu_clock import Contender
from benchmarks.gpu_numerics import numerics
from benchmarks.gpu_times import fast_convolutions
from benchmarks.gpu_worker import Context
from den_kernels._triton import clock
from den_kernels.float32 import allows_tf32
from tests.simulated_gpu import Graph, simulated

GPU = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch):
    with simulated(monkeypatch):
        yield


def test_the_device_is_busy_until_the_call_is_in_its_queue(gpu, monkeypatch):
    order = []

    class Event(torch.cuda.Event):
        def record(self, stream=None):
            order.append("event")
            super().record(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    clock.elapsed(lambda: order.append("call"), GPU)
    assert order == ["sleep", "event", "call", "event"]


@pytest.mark.parametrize(("replay", "times"), [(1e-5, 16), (6e-5, 4), (1e-2, 1)])
def test_repeats_follow_the_replay_and_not_the_eager_calls(replay, times, gpu, monkeypatch):
    """The host takes a second for calls that the device makes in microseconds: a graph needs only the latter."""

    def seconds(call, device):
        return replay if isinstance(getattr(call, "__self__", None), Graph) else 1.0

    monkeypatch.setattr(gpu_clock, "elapsed", seconds)
    x = torch.zeros(2, device=GPU)
    timed = gpu_clock.ready(Contender("ours", "ours", lambda i: x.add_(1)), 3, Context("cuda:0"))
    assert timed.graph
    assert timed.calls == 3 * times
    before = x[0].item()
    timed.run()
    assert x[0].item() == before + 3 * times


@pytest.fixture
def settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, allowed = [s.fp32_precision for s in (torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul)], allows_tf32()
    yield lambda: [s.fp32_precision for s in (torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul)]
    for setting, value in zip((torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul), before, strict=True):
        setting.fp32_precision = value
    cudnn.allow_tf32 = allowed  # else reading it would raise in other tests


@pytest.mark.parametrize("context", [numerics, fast_convolutions])
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("said", ["nothing", "all tf32", "all ieee", "conv ieee"])
def test_precision_is_set_and_given_back_whatever_was_said_before(said, tf32, context, settings):
    """Reading the older `allow_tf32` raises an error after `cudnn.conv.fp32_precision = "ieee"`."""
    if said.startswith("all"):
        torch.backends.fp32_precision = said.split()[1]
    elif said == "conv ieee":
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = settings()
    with context(tf32):
        assert allows_tf32() == tf32
        assert torch.backends.cudnn.allow_tf32 == tf32  # torch.compile reads it
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == tf32
    assert settings() == before
