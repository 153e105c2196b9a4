"""Values of a cache and the streams of a GPU, on a simulated one that sees what is read too early."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from den_kernels.fold_cache import FoldCache
from den_kernels.stream_guard import Guarded, tensors_of
from tests.simulated_gpu import simulated


@dataclasses.dataclass
class Pair:
    scale: Tensor
    shift: Tensor | None
    stride: int = 1


class Cache:
    """One value, kept: what `FoldCache` does with it."""

    def __init__(self) -> None:
        self.entry, self.captured = None, []

    def get(self, source: Tensor) -> Pair:
        if self.entry is None:
            self.entry = Guarded(lambda: Pair(source * 2, source + 1), self.captured)
        return self.entry.get()


@pytest.fixture
def source(monkeypatch):
    with simulated(monkeypatch):
        yield torch.ones(4).to("cuda:0")


@pytest.fixture
def side(source):
    """A stream that comes after the source, and after nothing later."""
    made = torch.cuda.Stream()
    made.wait_stream(torch.cuda.current_stream())
    return made


def test_without_a_guard_another_stream_reads_too_early(source, side):
    value = source * 2
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match=r"reads before stream \d+ wrote"):
        value + 1


def test_another_stream_waits_for_the_building(source, side):
    cache = Cache()
    cache.get(source)
    with torch.cuda.stream(side):
        got = cache.get(source)
        assert (got.scale + got.shift).cpu().tolist() == [4.0] * 4


def test_the_stream_that_built_comes_first_or_second(source, side):
    cache = Cache()
    with torch.cuda.stream(side):
        cache.get(source)
    assert (cache.get(source).scale + 1).cpu().tolist() == [3.0] * 4


def test_memory_is_kept_for_every_stream_that_read_it_and_told_once(source, side):
    cache = Cache()
    value = cache.get(source)
    assert value.scale.readers == []  # its own stream needs no telling
    for _ in range(3):
        with torch.cuda.stream(side):
            cache.get(source)
    assert value.scale.readers == value.shift.readers == [side]


def test_a_value_built_anew_is_waited_for_anew(source, side):
    cache = Cache()
    for _ in range(2):
        cache.entry = None
        cache.get(source)
        with torch.cuda.stream(side):
            got = cache.get(source)
            got.scale + got.shift
            assert got.scale.readers == [side]


def test_nothing_is_built_while_a_graph_is_captured(source):
    cache = Cache()
    with (
        pytest.raises(RuntimeError, match=r"run the network once before capturing, or freeze\(\) it"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cache.get(source)
    assert cache.entry is None
    assert cache.get(source).scale.cpu().tolist() == [2.0] * 4  # a call outside is right


def test_what_a_graph_reads_lives_as_long_as_the_cache(source):
    """Though the weights change and the cache builds another value."""
    cache = Cache()
    cache.get(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cache.get(source)
        y = captured.scale + captured.shift
        cache.get(source)
    source.add_(1)
    cache.entry = None
    assert cache.get(source).scale is not captured.scale
    assert [id(kept) for kept in cache.captured] == [id(captured)]
    graph.replay()
    assert y.cpu().tolist() == [4.0] * 4
    assert captured.scale.readers == []  # a capturing stream cannot be waited for


def test_on_a_cpu_nothing_is_asked_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("asked"))
    cache, weight = FoldCache(), torch.ones(2)
    made = cache.get((weight,), lambda: Pair(weight * 2, None))
    assert cache.get((weight,), lambda: pytest.fail("built anew")) is made


def test_tensors_of_values():
    a, b, c = (torch.zeros(1) for _ in range(3))
    norm = nn.BatchNorm2d(2)
    assert [id(t) for t in tensors_of((a, [Pair(b, None)], {"c": c}, "text", 3, None))] == [id(a), id(b), id(c)]
    assert len(list(tensors_of(norm))) == 5
