"""Parameters that are views, and convolutions without oneDNN: no op takes a layout for granted."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from den.nn.blocks import BottleneckShape
from den.nn.ends import ConvNormReLU
from den_kernels import (
    DynamicConv2d,
    GraphWeights,
    ResidualWeights,
    RoutingPlan,
    dynamic_batch_norm,
    dynamic_conv2d,
    dynamic_graph,
    dynamic_residual,
)
from tests.oracle import unlike_new

LEVELS = torch.tensor([1, 3, 2, 0, 3, 1])
MASK = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()
SELECTIONS = pytest.mark.parametrize("selection", [LEVELS, MASK], ids=["levels", "mask"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def image(C: int, dtype: torch.dtype = torch.float32, size: int = 9) -> Tensor:
    x = torch.randn(6, C, size, size, generator=torch.Generator().manual_seed(7)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def wide(shape: tuple[int, ...], axis: int, spare: int) -> tuple[int, ...]:
    return *shape[:axis], shape[axis] + spare, *shape[axis + 1 :]


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def nans(like: Tensor, *shape: int) -> Tensor:
    """Channels-last memory of NaN."""
    return last(torch.full(shape, torch.nan, dtype=like.dtype))


# A weight [O, I, R, S] as a view of larger memory, or of memory in another order.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "inputs of a wider one": lambda w: nans(w, *wide(w.shape, 1, 16))[:, 16:].copy_(w),
    "crop of the taps": lambda w: nans(w, *w.shape[:2], 5, 5)[:, :, 1 : 1 + w.shape[2], 1 : 1 + w.shape[3]].copy_(w),
    "every other output": lambda w: nans(w, 2 * w.shape[0], *w.shape[1:])[::2].copy_(w),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "off a boundary": lambda w: torch.full((w.numel() + 1,), torch.nan, dtype=w.dtype)[1:].view(w.shape).copy_(w),
    "one kernel for all": lambda w: last(w[:1]).expand(w.shape),
}


def every_other(v: Tensor) -> Tensor:
    """v [n] as a view with gaps."""
    return torch.full((2 * v.shape[0],), torch.nan, dtype=v.dtype)[::2].copy_(v)


def strided(module: nn.Module, view: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module with all of its tensors as views with gaps."""
    for m in module.modules():
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                if t is not None and t.is_floating_point():
                    made = view(t.detach()) if t.ndim == 4 else every_other(t.detach())
                    tensors[name] = nn.Parameter(made) if isinstance(t, nn.Parameter) else made
    return module


@DTYPES
@SELECTIONS
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("C", "O"), [(16, 32), (12, 15)])
def test_convolution_of_views(C, O, view, selection, dtype):
    weight, bias, x = last(torch.randn(O, C, 3, 3).to(dtype) / 8), torch.randn(O).to(dtype), image(C, dtype)
    made = []
    same = VIEWS[view](weight)
    for w, b in ((last(same.clone()), bias), (same, every_other(bias))):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = dynamic_conv2d(*leaves, selection, padding=1, out_groups=(O - 9, 4, 5))
        made.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)))
    near = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    for got, want in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=near, atol=near * float(want.float().abs().max()))


def dense(module: nn.Module) -> nn.Module:
    """The same with tensors of their own, without gaps."""
    made = deepcopy(module)
    for m, other in zip(made.modules(), module.modules(), strict=True):
        for name, t in (other._parameters | other._buffers).items():
            if t is not None and t.is_floating_point():
                copy = last(t.detach().clone()) if t.ndim == 4 else t.detach().clone().contiguous()
                where = m._parameters if name in m._parameters else m._buffers
                where[name] = nn.Parameter(copy) if isinstance(t, nn.Parameter) else copy
    return made


def modules(C: int, M: int) -> nn.Module:
    conv1 = DynamicConv2d(C, M, 3, padding=1, out_groups=(M - 9, 4, 5))
    parts = [conv1, nn.BatchNorm2d(C), nn.Conv2d(M, C, 3, padding=1), nn.BatchNorm2d(M)]
    return unlike_new(nn.ModuleList(parts)).eval()


@DTYPES
@SELECTIONS
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("C", "M"), [(16, 32), (128, 256), (12, 13)])
def test_residual_block_of_views(C, M, view, selection, dtype):
    block, x = modules(C, M), image(C, dtype)
    for conv in block[::2]:
        conv.to(dtype)
    for copy in (True, False):
        made = strided(deepcopy(block), VIEWS[view])
        want = dynamic_residual(x, selection, ResidualWeights.fold(*dense(made), copy=copy))
        got = dynamic_residual(x, selection, ResidualWeights.fold(*made, copy=copy))
        near = 1e-4 if dtype != torch.bfloat16 else 2**-6  # read in place or packed: rounded once more or less
        torch.testing.assert_close(got, want, rtol=near, atol=near)


NORM_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@DTYPES
@pytest.mark.parametrize("C", [16, 12])
@pytest.mark.parametrize("norms", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("post", [False, True])
def test_norms_of_other_dtypes_fold_to_scales_of_float32(post, norms, C, dtype):
    block, x = modules(C, C if post else 13), image(C, dtype)
    for conv in block[::2]:
        conv.to(dtype)
    for norm in block[1::2]:
        norm.to(norms)
    weights = ResidualWeights.fold(*block, post_activation=post)
    for name in ("scale1", "shift1", "scale2", "bias1"):
        assert (value := getattr(weights, name)) is None or value.dtype == torch.float32, name
    exact = ResidualWeights.fold(*deepcopy(block).double(), post_activation=post)
    near = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    got, want = dynamic_residual(x, LEVELS, weights), dynamic_residual(x.double(), LEVELS, exact)
    torch.testing.assert_close(got.double(), want, rtol=near, atol=near * float(want.abs().max()))


def test_norms_of_float32_beside_convolutions_of_float64_stay_exact():
    block, x = modules(16, 32), image(16).double()
    for conv in block[::2]:
        conv.double()
    got = dynamic_residual(x, LEVELS, ResidualWeights.fold(*block))
    torch.testing.assert_close(got, dynamic_residual(x, LEVELS, ResidualWeights.fold(*block.double())))


@pytest.mark.parametrize("norms", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 24])  # in one call, and composed
def test_bottleneck_of_other_norms_and_views(width, norms):
    block = unlike_new(BottleneckShape(16, 32, width, 9, 1).build(4)).eval()
    x, route = image(16), RoutingPlan.from_levels(LEVELS[:, None], 3)[0]
    for norm in (block.bn1, block.bn2, block.bn3):
        norm.to(norms)
    made = strided(deepcopy(block), lambda w: last(torch.full(wide(w.shape, 1, 8), torch.nan))[:, 8:].copy_(w))
    with torch.no_grad():
        for got in (block(x, route), made(x, route)):
            torch.testing.assert_close(got.double(), deepcopy(block).double()(x.double(), route), rtol=1e-4, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_of_views(training, dtype):
    x, values = image(32, dtype), torch.rand(4, 32) + 0.5
    made = []
    for view in (Tensor.clone, every_other):
        weight, bias, mean, var = (view(v) for v in values)
        y = dynamic_batch_norm(x, LEVELS, weight, bias, mean, var, groups=(8, 8, 16), training=training, relu=True)
        made.append((y, mean, var))
    for got, want in zip(*made, strict=True):
        assert torch.equal(got, want)


def graph(view: Callable[[Tensor], Tensor] = Tensor.clone) -> tuple[GraphWeights, RoutingPlan, list[Tensor]]:
    torch.manual_seed(3)
    edges = [(0, 1), (0, 2), (1, 2)]
    weights, biases = [view(torch.randn(16, 16, 3, 3) / 12) for _ in edges], [torch.randn(16) for _ in edges]
    plan = RoutingPlan.from_levels(torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]] * 2), 1)
    rows = [torch.randn(3, 6).t() for _ in range(3)]
    return GraphWeights.pack(3, edges, weights, biases), plan, rows


@pytest.mark.parametrize("view", VIEWS)
def test_graph_of_views(view):
    made = []
    for weights, plan, rows in (graph(lambda w: last(VIEWS[view](w).clone())), graph(VIEWS[view])):
        made += [dynamic_graph(image(16), g, plan, *rows) for g in (weights, _by_edges(weights))]
    for got in made[1:]:
        torch.testing.assert_close(got, made[0], rtol=1e-4, atol=1e-4)


def _by_edges(weights: GraphWeights) -> GraphWeights:
    return GraphWeights(weights.states, weights.edges, weights.weights, weights.biases)


def without_onednn(call: Callable[[], tuple[Tensor, ...]], near: float = 1e-4) -> None:
    """Whatever `call` gives is the same where oneDNN is switched off, in and out of deterministic mode."""
    want = call()
    for settings in ({"enabled": False}, {"enabled": False, "deterministic": True}, {"deterministic": True}):
        with torch.backends.mkldnn.flags(**settings):
            got = call()
        for ours, theirs in zip(got, want, strict=True):
            assert ours.stride() == theirs.stride()
            atol = near * float(theirs.float().abs().max())
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=near, atol=atol)


CONVOLUTIONS = {
    "direct": (16, 32, (8, 8, 16), {}),
    "odd": (12, 13, (4, 4, 5), {}),
    "cardinality": (12, 24, (8, 8, 8), {"groups": 3}),
    "stride": (12, 13, (4, 4, 5), {"stride": 2}),
}
NEAR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@DTYPES
@SELECTIONS
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_without_onednn(case, format, selection, dtype):
    C, O, sizes, settings = CONVOLUTIONS[case]
    x = image(C, dtype).contiguous(memory_format=format).requires_grad_()
    weight = (torch.randn(O, C // settings.get("groups", 1), 3, 3) / 8).to(dtype).requires_grad_()
    bias = torch.randn(O).to(dtype).requires_grad_()

    def call() -> tuple[Tensor, ...]:
        y = dynamic_conv2d(x, weight, bias, selection, padding=1, out_groups=sizes, **settings)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weight, bias))

    without_onednn(call, NEAR[dtype])


@DTYPES
@SELECTIONS
@pytest.mark.parametrize(("C", "M"), [(16, 32), (12, 13)])
def test_blocks_without_onednn(C, M, selection, dtype):
    block, x = modules(C, M), image(C, dtype)
    for conv in block[::2]:
        conv.to(dtype)
    weights = ResidualWeights.fold(*block)
    without_onednn(lambda: (dynamic_residual(x, selection, weights),), NEAR[dtype])
    without_onednn(lambda: (dynamic_residual(x, selection, ResidualWeights.fold(*block)),), NEAR[dtype])


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 24])
def test_other_blocks_without_onednn(width):
    block = unlike_new(BottleneckShape(16, 32, width, 9, 2).build(4)).eval()
    route = RoutingPlan.from_levels(LEVELS[:, None], 3)[0]
    without_onednn(lambda: (block(image(16), route),))
    stem = unlike_new(ConvNormReLU(12, 20, 3, 2, 1)).eval()
    without_onednn(lambda: (stem(image(12)),))
    weights, plan, rows = graph()
    for g in (weights, _by_edges(weights)):
        without_onednn(lambda g=g: (dynamic_graph(image(16), g, plan, *rows),))
