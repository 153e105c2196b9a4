"""NaN and infinities through every op and way: they reach what PyTorch's equation says, and nothing else."""

import pytest
import torch
from torch import nn

from den.nn.blocks import BottleneckShape
from den_kernels import (
    DynamicConv2d,
    GraphWeights,
    ResidualWeights,
    RoutingPlan,
    dynamic_batch_norm,
    dynamic_conv2d,
    dynamic_graph,
    dynamic_residual,
    residual_weights,
    rows,
)
from den_kernels._extension import extension
from den_kernels._residual_gpu import masked_branch
from den_kernels.dynamic_graph import dynamic_graph_reference
from den_kernels.dynamic_norm import dynamic_batch_norm_reference
from den_kernels.plan import as_route
from den_kernels.testing import channel_mask
from tests.oracle import unlike_new

NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
VALUES = pytest.mark.parametrize("value", [NAN, INF], ids=str)
LEVELS = torch.tensor([1, 3, 2, 0, 3])
MASK = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]]).bool()
SELECTIONS = pytest.mark.parametrize("selection", [LEVELS, MASK], ids=["levels", "mask"])


def kinds(x: torch.Tensor) -> torch.Tensor:
    """0 where finite, 1 NaN, 2 and 3 the infinities."""
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def assert_same_kinds(got: torch.Tensor, exact: torch.Tensor, some: bool = True, spreads: bool = False) -> None:
    """Not finite in the same places in the same way, close elsewhere; `some`: in one place at least.

    spreads: a value may reach more of its own instance than it should, as NaN.
    """
    if spreads:  # what is NaN besides leaves the comparison; the instances without such a value stay in it
        more = got.isnan() & ~exact.isnan()
        assert not more[exact.isfinite().flatten(1).all(1)].any()
        got, exact = torch.where(more, NAN, got), torch.where(more, NAN, exact)
    differ = kinds(got) != kinds(exact)
    assert not differ.any(), f"{int(differ.sum())} elements, first {differ.nonzero()[0].tolist()}"
    assert exact.isfinite().any()
    assert not some or not exact.isfinite().all()
    near = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25, torch.float64: 1e-9}[got.dtype]
    finite = exact.isfinite()
    torch.testing.assert_close(got[finite].double(), exact[finite], rtol=near, atol=near)


# oneDNN 3.12's bfloat16 convolution with AMX, by which PyTorch runs F.conv2d, reads beyond the window where the
# channels are no multiple of 8, and multiplies what it finds by 0.
def onednn_spreads(dtype: torch.dtype, channels: list[int]) -> bool:
    return dtype == torch.bfloat16 and any(c % 8 for c in channels)


def image(C: int, H: int, W: int, dtype: torch.dtype, value: float) -> torch.Tensor:  # [5, C, H, W] channels-last
    """One value that is not finite in every instance but the last: inside, and in three corners."""
    x = torch.randn(5, C, H, W).to(dtype)
    for b, (c, i, j) in enumerate([(3, H // 2, W // 2), (C - 1, 0, 0), (0, H - 1, W - 1), (C // 2, 0, W - 1)]):
        x[b, c, i, j] = value
    return x.contiguous(memory_format=torch.channels_last)


SIDES = {
    "narrow in, elastic out": (16, 32, (8, 8, 16), None),
    "narrow levels in": (32, 16, None, (8, 6, 18)),
    "odd levels in": (32, 32, (8, 8, 16), (7, 6, 19)),
    "both sides": (64, 64, (16, 16, 32), (40, 8, 16)),
    "odd channels": (12, 20, (5, 7, 8), (3, 4, 5)),
}
KERNELS = {
    "3 x 3": ((7, 9), 3, {"padding": 1}),
    "wide rows": ((5, 37), 3, {"padding": 1}),
    "stride 2": ((9, 8), 3, {"padding": 1, "stride": 2}),
    "5 x 5": ((8, 9), 5, {"padding": 2}),
    "1 x 1": ((6, 6), 1, {}),
    "dilation 2": ((9, 9), 3, {"padding": 2, "dilation": 2}),
}


@VALUES
@SELECTIONS
@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sides", SIDES)
def test_convolution(sides, kernel, dtype, selection, value):
    (C, O, outs, ins), ((H, W), side, settings) = SIDES[sides], KERNELS[kernel]
    x = image(C, H, W, dtype, value)
    weight, bias = (torch.randn(O, C, side, side) / 8).to(dtype), torch.randn(O).to(dtype)
    got = dynamic_conv2d(x, weight, bias, selection, out_groups=outs, in_groups=ins, **settings)
    reads = channel_mask(selection, ins)[:, :, None, None] if ins else torch.ones(()).bool()
    exact = nn.functional.conv2d(torch.where(reads, x, 0).double(), weight.double(), bias.double(), **settings)
    if outs:
        exact = torch.where(channel_mask(selection, outs)[:, :, None, None], exact, 0)
    by_onednn = C % 16 or O % 16 or settings.get("dilation")
    assert_same_kinds(got, exact, spreads=bool(by_onednn) and onednn_spreads(dtype, [C, *(ins or ())]))


@SELECTIONS
@DTYPES
@pytest.mark.parametrize("sizes", [(40, 8, 16), (8, 16, 8), (20, 4, 8), (5, 7, 4)], ids=str)
def test_weights_of_channels_that_are_not_selected(sizes, dtype, selection):
    """Each group's own are NaN in turn: only the instances that read the group see it."""
    if dtype == torch.bfloat16 and extension is not None and extension.bf16_isa() == "AVX-512 BF16" and sizes[0] % 2:
        pytest.skip("without AMX, the weights of a pair of channels are multiplied where one of them is selected")
    C, first = sum(sizes), 0
    x = torch.randn(5, C, 6, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    chosen = selection if selection.dtype == torch.bool else selection[:, None] > torch.arange(3)
    for g, size in enumerate(sizes):
        weight = (torch.randn(32, C, 3, 3) / 8).to(dtype)
        weight[:, first : first + size] = NAN
        got = dynamic_conv2d(x, weight, None, selection, padding=1, in_groups=sizes)
        assert got.isnan().flatten(1).any(1).tolist() == chosen[:, g].tolist()
        first += size


def block(C: int, M: int, dtype: torch.dtype, bn1: bool = True, post: bool = False) -> tuple:
    conv1 = DynamicConv2d(C, M, 3, padding=1, bias=False, out_groups=(M // 4, M // 4, M // 2)).to(dtype)
    norms = [unlike_new(nn.BatchNorm2d(n)).eval() for n in ((M, C) if post else (C, M))]
    return conv1, norms[0] if bn1 else None, nn.Conv2d(M, C, 3, padding=1, bias=False).to(dtype), norms[1]


def exact_block(parts: tuple, x: torch.Tensor, selection: torch.Tensor, post: bool) -> torch.Tensor:
    """The block in float64: the reference, instance by instance."""
    parts = [None if part is None else part.double() for part in parts]
    return dynamic_residual(x.double(), selection, ResidualWeights.fold(*parts, post_activation=post))


@VALUES
@SELECTIONS
@DTYPES
@pytest.mark.parametrize("way", ["usual", "without direct kernels", "without extension", "without oneDNN"])
@pytest.mark.parametrize(("C", "M"), [(16, 32), (64, 16), (24, 16)])
def test_residual_block(C, M, way, dtype, selection, value, monkeypatch):
    if way in ("without direct kernels", "without extension"):
        monkeypatch.setattr(residual_weights, "extension", None)
    if way == "without extension":
        monkeypatch.setattr(rows, "extension", None)
    for post in (False, True):
        parts, x = block(C, M, dtype, post=post), image(C, 6, 7, dtype, value)
        with torch.backends.mkldnn.flags(enabled=way != "without oneDNN"):
            weights = ResidualWeights.fold(*parts, post_activation=post)
            got = dynamic_residual(x, selection, weights)
        spreads = weights.direct is None and onednn_spreads(dtype, [C, *weights.groups])
        assert_same_kinds(got, exact_block(parts, x, selection, post), spreads=spreads)


@VALUES
@SELECTIONS
def test_residual_block_where_there_is_no_kernel(selection, value):
    parts, x = block(16, 16, torch.float32), image(16, 6, 6, torch.float32, value)
    out = x.clone()
    out.add_(masked_branch(x, as_route(selection, 3, 5), ResidualWeights.fold(*parts)))
    assert_same_kinds(out, exact_block(parts, x, selection, False))


@DTYPES
@pytest.mark.parametrize("C", [16, 24])
@pytest.mark.parametrize("where", ["conv1", "conv2", "bn1", "bn2"])
def test_parameters_that_are_nan(where, C, dtype, monkeypatch):
    """They pass the ReLU between the convolutions, for the instances that use them."""
    parts = dict(zip(("conv1", "bn1", "conv2", "bn2"), block(C, 16, dtype), strict=True))
    with torch.no_grad():
        if where == "conv2":
            parts["conv2"].weight[:, 9] = NAN  # of the last group
        else:
            parts[where].weight[9] = NAN
    x = torch.randn(5, C, 6, 6).to(dtype)
    for there in (residual_weights.extension, None):
        monkeypatch.setattr(residual_weights, "extension", there)
        got = dynamic_residual(x, LEVELS, ResidualWeights.fold(*parts.values()))
        nan = got.isnan().flatten(1).all(1).tolist()
        assert nan == ([True, True, True, False, True] if where == "bn1" else [False, True, False, False, True])


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@DTYPES
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_and_its_gradients(relu, training, dtype, value):
    groups, x = (8, 8, 16), image(32, 5, 6, dtype, value)
    dy = torch.randn(x.shape).to(dtype)
    made = []
    for op, kind in ((dynamic_batch_norm, dtype), (dynamic_batch_norm_reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_(), torch.linspace(0.5, 2, 32, dtype=kind), torch.zeros(32, dtype=kind)]
        if dtype in (torch.float16, torch.bfloat16) and kind == dtype:
            leaves[1:] = [leaf.float() for leaf in leaves[1:]]
        for leaf in leaves[1:]:
            leaf.requires_grad_()
        running = torch.zeros(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
        y = op(leaves[0], MASK, *leaves[1:], *running, groups=groups, training=training, relu=relu)
        gradients = torch.autograd.grad(y, leaves, dy.to(kind))
        made.append((y.detach(), *(g for g in gradients)))
    for got, exact in zip(*made, strict=True):
        if training and value != NAN:  # a mean of infinity: how it becomes NaN depends on the order of the sums
            got, exact = (torch.where(t.isfinite(), t, NAN) for t in (got, exact))
        assert_same_kinds(got, exact, some=False)


@VALUES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_bottleneck(stride, dtype, value):
    C = 32
    made = unlike_new(BottleneckShape(C, 64 * stride, 32, 6, stride).build(4)).to(dtype).eval()
    x, route = image(C, 6, 6, dtype, value), RoutingPlan.from_levels(LEVELS[:, None], 3)[0]
    with torch.no_grad():
        got = made(x, route)
    made = made.double()
    assert_same_kinds(got, made(x.double(), route).detach())


@VALUES
@pytest.mark.parametrize("whole", [True, False])
def test_graph(whole, value):
    edges = [(0, 1), (0, 2), (1, 2)]
    weights = [torch.randn(16, 16, 3, 3) / 12 for _ in edges]
    graph = GraphWeights.pack(3, edges, weights, [torch.randn(16) for _ in edges])
    if not whole:
        graph = GraphWeights(3, graph.edges, graph.weights, graph.biases)
    levels = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    read_in, gates, read_out = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    read_in[:2, 1], read_out[1:3, 0], gates[0, 0] = 0, 0, 0
    x = image(16, 7, 7, torch.float32, value)
    got = dynamic_graph(x, graph, RoutingPlan.from_levels(levels, 1), read_in, gates, read_out)
    exact = GraphWeights(3, graph.edges, *([t.double() for t in ts] for ts in (graph.weights, graph.biases)))
    doubles = (t.double() for t in (read_in, gates, read_out))
    assert_same_kinds(got, dynamic_graph_reference(x.double(), exact, levels, *doubles))
