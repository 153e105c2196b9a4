"""How `benchmarks` takes times on a GPU, and with which precision: on a simulated one."""

import pytest
import torch

from benchmarks import clocks
from benchmarks.precision import fast_convolutions
from den_kernels._triton import clock
from den_kernels.float32 import allows_tf32
from tests.on_gpu import numerics
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

    monkeypatch.setattr(clocks, "elapsed", seconds)
    x = torch.zeros(2, device=GPU)
    timed = clocks.DeviceClock(GPU).ready([lambda: x.add_(1)] * 3)
    assert timed.graph
    assert timed.calls == 3 * times
    before = x[0].item()
    timed.run()
    assert x[0].item() == before + 3 * times


def test_one_call_is_timed_behind_an_overwritten_cache_and_several_are_not(gpu):
    clock = clocks.DeviceClock(GPU)
    x = torch.zeros(2, device=GPU)
    for calls, flushed in ((1, 1), (3, 0)):
        timed = clock.ready([lambda: x.add_(1)] * calls)
        clock._flush.zero_()
        assert clock.seconds(timed) == pytest.approx(0.25e-3 / timed.calls)
        assert clock._flush[0].item() == flushed


def test_a_call_that_cannot_be_captured_is_timed_as_it_is(gpu):
    x = torch.ones(2, device=GPU)
    timed = clocks.DeviceClock(GPU).ready([lambda: x.cpu()])
    assert not timed.graph


def test_the_clock_of_the_tuner_times_graphs(gpu):
    x = torch.zeros(3, device=GPU)
    assert clock.median_seconds(lambda: x.add_(1), GPU, times=5) == pytest.approx(0.25e-3 / 5)
    assert x[0].item() == 2 + 5 * 17  # two calls before the capture, five in it, and sixteen replays of them


def settings() -> list[str]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return [setting.fp32_precision for setting in (torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul)]


@pytest.mark.parametrize("context", [numerics, fast_convolutions])
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("said", ["nothing", "all tf32", "all ieee", "conv ieee"])
def test_precision_is_set_and_given_back_whatever_was_said_before(said, tf32, context):
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
