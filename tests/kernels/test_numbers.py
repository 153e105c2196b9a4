"""The numbers of every op: no element errs more than twice as much as PyTorch's own operations do in the same dtype.

Errors are those from float64, in units of the terms that were added up for an element (`error_units`). The inputs are
ordinary ones and hostile ones: sums that only grow, sums that cancel, denormals, 1e30, -0.0, NaN and infinities.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks import BottleneckBlock, BottleneckShape, ElasticBlock
from den_kernels import GraphWeights, RoutingPlan, TrunkWeights, dynamic_batch_norm, dynamic_conv2d, dynamic_graph
from den_kernels import dynamic_trunk as trunk
from den_kernels._extension import extension
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.dynamic_graph import dynamic_graph_reference
from den_kernels.rows import gather_rows, pool_rows, scatter_rows_
from den_kernels.testing import assert_as_accurate, channel_mask, float32_limited_to, masked_conv2d
from tests.kernels.test_dynamic_norm import results, term_sizes
from tests.oracle import unlike_new

B, G = 4, 4
LEVELS = torch.tensor([4, 2, 3, 1])  # of the four instances
ROUTE = RoutingPlan.from_levels(LEVELS[:, None], G)[0]
KINDS = ("normal", "positive", "cancelling", "denormal", "huge", "negative zero", "not finite")
LATER = ("normal", "positive", "cancelling", "denormal", "negative zero")  # of 16 bits before a release
Row = tuple[str, Tensor, Tensor, Tensor, Tensor | None]  # name, result, PyTorch's, float64's, sizes of the terms


def values(kind: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Values of a kind in [...], exact in the dtype; those of maps are channels-last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    half = dtype == torch.float16
    if kind == "positive":
        x = x.abs()
    elif kind == "cancelling":  # neighbouring channels
        x[:, 1::2] = -x[:, : x.shape[1] // 2 * 2 : 2] * (1 + 2.0**-6)
    elif kind in ("denormal", "huge"):
        x = x * {"denormal": 1e-6 if half else 1e-39, "huge": 1e3 if half else 1e30}[kind]
    elif kind == "negative zero":
        x = torch.where(torch.rand(shape, generator=generator) < 0.7, -0.0, x)
    elif kind == "not finite":
        for b, value in enumerate((torch.nan, torch.inf, -torch.inf)):  # the fourth instance has none
            x[b, b, 0, b] = value
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_numbers(rows: Iterator[Row]) -> None:
    """Assert that no element errs more than twice as much as PyTorch's, and that the right ones are not finite.

    These are at least those that are not by definition, and at most those that PyTorch's operations leave so.
    """
    compared = 0
    for name, got, peer, exact, scale in rows:
        assert (got.shape, got.dtype) == (peer.shape, peer.dtype), name
        more = ~got.isfinite() & peer.isfinite()
        assert not more.any(), f"{name}: {int(more.sum())} elements are not finite where PyTorch's are"
        fewer = got.isfinite() & ~peer.isfinite() & ~exact.isfinite()
        assert not fewer.any(), f"{name}: {int(fewer.sum())} elements are finite and must not be"
        finite = exact.isfinite() & peer.isfinite()
        compared += int(finite.sum())
        try:
            assert_as_accurate(got[finite], peer[finite], exact[finite], None if scale is None else scale[finite])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert compared


CONVOLUTIONS = {  # channels, map, kernel, settings
    "1 x 1, few channels": (24, 6, 1, {}),
    "1 x 1, many channels": (1024, 5, 1, {}),
    "3 x 3": (64, 8, 3, {"padding": 1}),
    "3 x 3, many channels": (256, 6, 3, {"padding": 1}),
    "odd rows": (80, 7, 3, {"padding": 1}),
    "stride 2": (64, 9, 3, {"padding": 1, "stride": 2}),
    "7 x 7": (16, 16, 7, {"padding": 3}),
    "cardinality": (64, 6, 3, {"padding": 1, "groups": 8}),
}


def convolution(name: str, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """The output of a convolution and the gradients of its arguments."""
    C, side, kernel, settings = CONVOLUTIONS[name]
    sizes = (C // 8, C // 8, C // 4, C // 2)
    settings = {**settings, "out_groups": sizes, "in_groups": sizes}
    x = values(kind, dtype, B, C, side, side)
    usual = "positive" if kind == "positive" else "normal"
    weight = values(usual, dtype, C, C // settings.get("groups", 1), kernel, kernel, seed=1)
    bias = values(usual, dtype, 1, C, 1, 1, seed=2).flatten() * (0 if kind == "denormal" else 1)

    def run(op: Callable[..., Tensor], convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [convert(t).requires_grad_() for t in (x, weight, bias)]
        y = op(*leaves, LEVELS, **settings)
        grad = convert(values(usual, dtype, *y.shape, seed=3))
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    plain = run(dynamic_conv2d, lambda t: t.clone()), run(masked_conv2d, lambda t: t.clone())
    exact = run(dynamic_conv2d_reference if kind == "not finite" else masked_conv2d, lambda t: t.double())
    scales = run(masked_conv2d, lambda t: t.double().abs())
    yield from zip(("y", "dx", "dweight", "dbias"), *plain, exact, scales, strict=True)


def norm_by_torch(x: Tensor, levels: Tensor, *parameters: Tensor | None, groups: tuple[int, ...], **settings) -> Tensor:
    """`dynamic_batch_norm` by F.batch_norm: group after group, of the instances that use it. x [B, C, H, W]."""
    training, relu = settings["training"], settings["relu"]
    parts = []
    for g, of_group in enumerate(zip(*(t.split(groups) for t in parameters), strict=True)):
        weight, bias, mean, var = of_group
        users = (levels > g).nonzero().flatten()
        part = x.split(groups, 1)[g]
        y = F.batch_norm(part[users], mean, var, weight, bias, training)
        parts.append(torch.zeros_like(part).index_copy(0, users, y.relu() if relu else y))
    return torch.cat(parts, 1)


def norm(name: str, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """The output of a batch norm, its running statistics and the gradients of its arguments."""
    sizes, side, training, offset = NORMS[name]
    x, dy = (values(kind, dtype, B, sum(sizes), *side, seed=seed) for seed in (0, 1))
    x = x + offset
    settings = {"groups": sizes, "training": training, "relu": False}
    got = results(dynamic_batch_norm, x, LEVELS, dy, **settings)
    peer = results(norm_by_torch, x, LEVELS, dy, **settings)
    exact = results(norm_by_torch, x.double(), LEVELS, dy.double(), **settings)
    scales = term_sizes(*(t.nan_to_num(0, 0, 0) for t in (x, dy)), LEVELS, affine=True, tracked=True, **settings)
    if training:  # the mean is a sum too, of values that may be larger than their distances from it
        used = [x.nan_to_num(0, 0, 0).double().transpose(0, 1)[c, u] for c, u in enumerate(channel_users(sizes))]
        means = torch.stack([of_channel.abs().mean() for of_channel in used])
        scales["dweight"] += scales["dbias"] * means / torch.stack([each.std(correction=0) for each in used])
        scales["running_mean"] = means + exact["running_mean"].abs()
    for key in got:
        yield key, got[key], peer[key], exact[key], scales.get(key)


def channel_users(sizes: tuple[int, ...]) -> list[Tensor]:
    """Of each channel, which instances use it: bool [B]."""
    return list(channel_mask(LEVELS, sizes).unbind(1))


# Of means over a few values PyTorch's largest error is a matter of luck: test_dynamic_norm.py has these.
NORMS = {  # groups, map, training, mean
    "training": ((16, 16, 32, 64), (16, 16), True, 0),
    "training, narrow": ((2, 2, 4, 8), (32, 32), True, 0),
    "training, large maps": ((4, 4, 8, 16), (40, 40), True, 0),
    "training, small maps": ((16, 16, 32, 64), (8, 8), True, 0),
    "training, far from zero": ((16, 16, 32, 64), (16, 16), True, 100),
    "evaluation": ((16, 16, 32, 64), (16, 16), False, 0),
}


def block_by_torch(block: nn.Module, x: Tensor, levels: Tensor) -> Tensor:
    """A pre-activation block by PyTorch's convolutions and batch norms in eval mode. x [B, C, H, W]."""

    def activated(norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    y = x if block.bn1 is None else activated(block.bn1, x)
    for conv, after in block.layers():
        y = F.conv2d(y, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
        if after is not None:
            y = activated(after, y).where(channel_mask(levels, conv.out_groups)[:, :, None, None], 0)
    pooled = F.avg_pool2d(x, block.stride, ceil_mode=True) if block.stride > 1 else x
    return F.pad(pooled, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])) + y.where((levels > 0)[:, None, None, None], 0)


BLOCKS = {  # the blocks, and the map
    "residual": (lambda: [ElasticBlock(64, 64, G + 1)], 8),
    "residual, by pixels": (lambda: [ElasticBlock(16, 16, G + 1)], 16),
    "residual, wide": (lambda: [ElasticBlock(256, 256, G + 1)], 4),
    "residual, strided": (lambda: [ElasticBlock(32, 64, G + 1, stride=2)], 8),
    "bottleneck": (lambda: [BottleneckBlock(BottleneckShape(256, 64, 256, 7, 1), G + 1)], 7),
    "bottleneck, wide": (lambda: [BottleneckBlock(BottleneckShape(1024, 256, 1024, 5, 1), G + 1)], 5),
    "bottleneck, cardinality": (lambda: [BottleneckBlock(BottleneckShape(128, 64, 128, 7, 1, 8), G + 1)], 7),
    "trunk": (lambda: [ElasticBlock(32, 32, G + 1, first=True), ElasticBlock(32, 64, G + 1, stride=2)], 8),
}


@torch.no_grad()
def blocks(name: str, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """The output of blocks, one after the other, in one call."""
    make, side = BLOCKS[name]
    torch.manual_seed(0)
    made = [unlike_new(block).to(dtype).eval() for block in make()]
    C = made[0].conv1.in_channels
    x = values(kind, dtype, B, C, side, side)
    results = [x, x.double()]
    plan = RoutingPlan.from_levels(LEVELS[:, None].repeat(1, len(made)), G)
    if len(made) == 1:
        got = made[0](x, plan[0])
    else:
        got = trunk(x.clone(), plan, TrunkWeights(tuple(block.folded() for block in made), None, None))
    for block in made:
        results[0] = block_by_torch(block, results[0], LEVELS)
        results[1] = block_by_torch(block.double(), results[1], LEVELS)
        block.to(dtype)
    yield "y", got, *results, None


EDGES = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
GRAPHS = {"narrow": (16, 8), "48 channels": (48, 7), "wide": (144, 7)}  # channels, map


def graph(name: str, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """The gated sum of a graph of convolutions."""
    C, side = GRAPHS[name]
    usual = "positive" if kind == "positive" else "normal"
    weights = [values(usual, dtype, C, C, 3, 3, seed=e + 1) / (9 * C) ** 0.5 for e in range(len(EDGES))]
    biases = [values(usual, dtype, 1, C, 1, 1, seed=e + 11).flatten() for e in range(len(EDGES))]
    rows = [values("positive", dtype, B, n, 1, 1, seed=n).flatten(1) for n in (4, len(EDGES), 4)]
    levels = torch.rand(B, len(EDGES)).round().int()
    x = values(kind, dtype, B, C, side, side)
    packed = GraphWeights.pack(4, EDGES, weights, biases)
    wide = GraphWeights.pack(4, EDGES, [w.double() for w in weights], [b.double() for b in biases])
    got = dynamic_graph(x, packed, RoutingPlan.from_levels(levels, 1), *rows)
    peer = graph_by_torch(x, packed, levels, *rows)
    exact = dynamic_graph_reference(x.double(), wide, levels, *(row.double() for row in rows))
    yield "y", got, peer, exact, None


def graph_by_torch(x: Tensor, weights: GraphWeights, levels: Tensor, *rows: Tensor) -> Tensor:
    """A graph by PyTorch's convolutions of the whole batch, masked where an edge is not used. x [B, C, H, W]."""
    read_in, gates, read_out = (row[:, :, None, None, None] for row in rows)
    states: list[Tensor] = []
    for j in range(weights.states):
        v = read_in[:, j] * x
        for e, (i, head) in enumerate(EDGES):
            if head == j:
                y = F.conv2d(states[i], weights.weights[e], weights.biases[e], padding=1).relu()
                v = v + (gates[:, e] * y).where((levels[:, e] > 0)[:, None, None, None], 0)
        states.append(v)
    return sum((read_out[:, j] * v for j, v in enumerate(states)), torch.zeros_like(x))


def rows(name: str, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """Rows gathered, added to others, and pooled."""
    x, base = (values(kind, dtype, B, 24, 7, 7, seed=seed) for seed in (0, 1))
    order = torch.tensor([2, 0, 3], dtype=torch.int32)
    chosen = x[order.long()]
    yield "gathered", gather_rows(x, order, 8, start=3), chosen[:, 3:11], chosen[:, 3:11].double(), None
    sums = base.clone(memory_format=torch.channels_last), base.clone(), base.double()
    scatter_rows_(sums[0], chosen, order, 0, accumulate=True)
    for total in sums[1:]:
        total.index_add_(0, order.long(), chosen.to(total.dtype))
    yield "added", *sums, None
    pooled = [F.pad(F.avg_pool2d(t, 2, ceil_mode=True), (0, 0, 0, 0, 0, 8)) for t in (x, x.double())]
    yield "pooled", pool_rows(x, 32, 2), *pooled, None


OPS = [
    (op, name)
    for op, names in ((convolution, CONVOLUTIONS), (norm, NORMS), (blocks, BLOCKS), (graph, GRAPHS), (rows, ["rows"]))
    for name in names
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("op", "name"), OPS, ids=[f"{op.__name__}-{name}" for op, name in OPS])
def test_float32(op, name, kind):
    assert_numbers(op(name, kind, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["huge", "not finite", *(pytest.param(k, marks=pytest.mark.release) for k in LATER)])
@pytest.mark.parametrize(("op", "name"), OPS, ids=[f"{op.__name__}-{name}" for op, name in OPS])
def test_half_precision(op, name, kind, dtype):
    assert_numbers(op(name, kind, dtype))


@pytest.mark.skipif(extension is None or extension.float32_isa() != "AVX-512", reason="this CPU's best is AVX2")
@pytest.mark.parametrize(("op", "name"), OPS, ids=[f"{op.__name__}-{name}" for op, name in OPS])
def test_avx2(op, name):
    with float32_limited_to("AVX2"):
        for kind in ("normal", "positive"):
            assert_numbers(op(name, kind, torch.float32))
