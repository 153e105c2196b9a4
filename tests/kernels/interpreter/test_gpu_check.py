"""What only a GPU runs of tests/gpu, the benchmarks and `den_kernels.tune`, with the kernels interpreted."""

import pytest
import torch
from torch import Tensor

from benchmarks import harness, test_bench_conv
from den_kernels import _triton, tune
from den_kernels._geometry import Geometry
from den_kernels._triton import dynamic_conv as kernels
from den_kernels._triton import rules, table
from den_kernels._triton.rules import Tile
from den_kernels._triton.trial import Case, ragged, trials
from den_kernels.plan import as_route
from den_kernels.testing import ConvCase
from tests.gpu.test_convolution import check_convolution
from tests.on_gpu import Context

HALF, FULL, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
TINY = Context("cpu", tiny=True)


class Convolution(torch.autograd.Function):
    """The Triton kernels on CPU tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, route, geometry):
        ctx.save_for_backward(x, weight)
        ctx.rest = route, geometry, bias is not None
        return kernels.forward(x, weight, bias, route, geometry)

    @staticmethod
    def backward(ctx, grad):
        route, geometry, bias = ctx.rest
        return *kernels.backward(grad, *ctx.saved_tensors, route, geometry, (True, True, bias)), None, None


def convolve(x, weight, bias, selection, *, stride, padding, dilation, groups, out_groups, in_groups) -> Tensor:
    pair = lambda value: (value, value) if isinstance(value, int) else value  # noqa: E731
    sides = out_groups or (), in_groups or ()
    geometry = Geometry(pair(stride), pair(padding), pair(dilation), groups, *sides)
    return Convolution.apply(x, weight, bias, as_route(selection, len(sides[0]) or len(sides[1]), len(x)), geometry)


@pytest.mark.parametrize(
    ("selection", "way"), [("uniform", "bfloat16"), pytest.param("mask", "float32", marks=pytest.mark.release)]
)
def test_convolutions_pass_the_check(selection, way):
    case = ConvCase(batch=2, size=(5, 4), in_sizes=(16, 16), out_sizes=(16, 16), selection=selection, seed=3)
    found = check_convolution(case, way, TINY, convolve)
    assert set(found["errors"]) == {"y", "dx", "dweight", "dbias"}


@pytest.mark.parametrize("case", test_bench_conv.TINY, ids=lambda case: case.id)
def test_the_kernel_that_is_timed_computes_the_convolution(case, monkeypatch):
    monkeypatch.setattr(_triton, "runs_on", lambda device: True)
    with torch.no_grad():
        providers = test_bench_conv.peer_providers(test_bench_conv.make_operands(case), case.dtype == harness.TF32)
    kernel = next(provider for provider in providers if provider.name == "ours-kernel")
    harness.check(kernel.name, kernel.call(), kernel.expected)
    with pytest.raises(AssertionError, match="error against float64"):
        harness.check(kernel.name, kernel.call() + 0.1, kernel.expected)


@pytest.mark.parametrize(("kind", "dtype"), [("convolve", HALF), ("weight", FULL)])
def test_runs_of_the_tuner_are_right_and_tell_wrong_from_right(kind, dtype, monkeypatch):
    case = Case(kind, 16, 4, 4, dtype)
    tested = trials(case, CPU)
    assert all(run.error() <= 1 for run in tested)
    assert ragged(case, CPU).error() <= 1
    run = tested[0]
    call = run.call
    monkeypatch.setattr(run, "call", lambda: call() * 1.2)
    assert run.error() > 1
    monkeypatch.setattr(run, "call", lambda: run.exact * float("nan"))
    assert run.error() == float("inf")


def test_a_tile_is_scored_through_the_launchers(monkeypatch):
    monkeypatch.setattr(tune, "median_seconds", lambda call, device: 1.0)
    tested = trials(Case("convolve", 16, 4, 4, HALF), CPU)
    assert tune.score(Tile(32, 16, 16, 4, 2, 1), tested, 80) == 3.0
    assert tune.score(Tile(3, 16, 16, 4, 2, 1), tested, 80) == float("inf")  # Triton refuses it
    assert tune.is_trusted(Tile(32, 16, 16, 4, 2, 1), tested, 80)
    assert table.tiles(80) == {}
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(tested[0], "error", lambda: (_ for _ in ()).throw(error))
    assert tune.score(Tile(32, 16, 16, 4, 2, 1), tested, 80) == float("inf")


def test_tuning_writes_a_table(monkeypatch, tmp_path):
    times = (0.9**i for i in range(1000))  # every tile faster than the one before
    monkeypatch.setattr(tune, "median_seconds", lambda call, device: next(times))
    monkeypatch.setattr(tune, "VALUES", {"rows": (128,), "programs": (2,)})
    assert len(tune.tune([Case("convolve", 16, 4, 2, HALF)], CPU, 600.0, tmp_path)) == 1
    table.tiles.cache_clear()
    kept = table.parse(table.file_of(80, tmp_path).read_text(), 80, rules.installed())
    assert kept == {("convolve", 16, 16, "bfloat16"): (128, 16, 16, 4, 3, 2)}
