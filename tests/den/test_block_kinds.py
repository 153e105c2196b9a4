"""Blocks of every kind against the strict reference: masked after the activation, statistics of the users alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from den import Task, create_model
from den.nn.blocks import BottleneckShape, LinearPairShape, PairShape, ResidualShape
from den.nn.reference import reference_block
from den_kernels import RoutingPlan, _bottleneck_composed
from den_kernels.dynamic_conv import compute
from tests.oracle import assert_trained_alike, unlike_new

L = 4
KINDS = {
    "residual": ResidualShape(16, 16, 16, 8, stride=1),
    "residual grows": ResidualShape(8, 20, 20, 8, stride=1),
    "residual downsamples": ResidualShape(8, 16, 16, 8, stride=2),
    "residual, same width, half map": ResidualShape(16, 16, 16, 8, stride=2),
    "bottleneck": BottleneckShape(16, 8, 16, 8, stride=1),
    "bottleneck grows": BottleneckShape(8, 24, 16, 8, stride=1),
    "bottleneck downsamples": BottleneckShape(16, 16, 32, 8, stride=2),
    "cardinality": BottleneckShape(16, 32, 16, 8, stride=1, cardinality=8),
    "cardinality, odd, downsamples": BottleneckShape(8, 40, 20, 8, stride=2, cardinality=5),
    "pair": PairShape(8, 16, 12, 8, (False, False)),
    "pair, pools between": PairShape(3, 8, 16, 8, (True, False)),
    "pair, pools after both": PairShape(12, 20, 8, 8, (True, True)),
    "pair, strides": PairShape(12, 20, 8, 9, (True, True), strided=True),
    "fully connected": LinearPairShape(5, 24, 13, 3),
    "fully connected, of one pixel": LinearPairShape(32, 48, 16, 1),
}
BUILDS = {kind: (shape, False) for kind, shape in KINDS.items()} | {
    f"{kind}, first": (KINDS[kind], True) for kind in ("residual", "residual grows", "bottleneck grows")
}  # shape, and whether it is the network's first block
LEVELS = {
    "mixed": [3, 0, 1, 2, 2, 0, 3, 1],
    "all at level 0": [0] * 5,
    "full": [3] * 4,
    "one at level 1": [0, 0, 1, 0],
    "one instance": [2],
}


def make(shape, dtype=torch.float32, first=False):
    """A block whose every norm has its own weight, bias and statistics."""
    torch.manual_seed(0)
    return unlike_new(shape.build(L, first)).to(dtype)


def data(shape, levels, dtype=torch.float32, side=8, seed=1):
    side = shape.in_size if isinstance(shape, LinearPairShape) else side  # which reads no other map
    x = torch.randn(len(levels), shape.in_channels, side, side, generator=torch.Generator().manual_seed(seed))
    levels = torch.tensor(levels, dtype=torch.int32)
    return x.to(dtype, memory_format=torch.channels_last), levels, route_of(levels, shape.lowest)


def route_of(levels, lowest):
    return RoutingPlan.from_levels(levels[:, None] + lowest, L - 1 + lowest)[0]


def plan_of_pairs(*levels):
    """The plan of a network whose lowest level keeps a group, for one image at this level of every block."""
    estimator = create_model("simpleconvnet", [Task("a", 2, 32)], L).estimator
    return estimator.level_plan(torch.tensor([levels]).expand(1, estimator.num_blocks))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=3e-5)


builds = pytest.mark.parametrize(("shape", "first"), BUILDS.values(), ids=BUILDS)
kinds = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
residuals = pytest.mark.parametrize(
    "shape", [s for s in KINDS.values() if not s.lowest], ids=[k for k, s in KINDS.items() if not s.lowest]
)
normed = pytest.mark.parametrize(
    "shape",
    [s for s in KINDS.values() if not isinstance(s, LinearPairShape)],
    ids=[k for k, s in KINDS.items() if not isinstance(s, LinearPairShape)],
)


def check_inference(shape, first, levels, side):
    block = make(shape, first=first).eval()
    x, levels, route = data(shape, levels, side=side)
    expected = reference_block(block, x, levels, L).detach()
    close(block(x, route).detach(), expected)
    with torch.no_grad():
        fast = block(x, route)
    close(fast, expected)
    assert fast.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@builds
def test_inference_equals_the_reference(shape, first, levels):
    check_inference(shape, first, levels, side=7)


@pytest.mark.parametrize("side", [8, 1])
@residuals
def test_maps_of_residual_blocks_may_be_of_any_side(shape, side):
    check_inference(shape, False, LEVELS["mixed"], side)


@pytest.mark.parametrize(
    ("shape", "first", "levels"),
    [(*build, LEVELS[name]) for name in ("mixed", "all at level 0") for build in BUILDS.values()],
    ids=[f"{kind}, {name}" for name in ("mixed", "all at level 0") for kind in BUILDS],
)
def test_training_equals_the_reference_with_gradients_and_statistics(shape, first, levels):
    block = make(shape, torch.float64, first).train()
    oracle = copy.deepcopy(block)
    x, levels, route = data(shape, levels, torch.float64)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = block(mine, route), reference_block(oracle, its, levels, L)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, its.grad, rtol=1e-8, atol=1e-8)
    assert_trained_alike(block, oracle)


@settings(max_examples=25)
@given(
    levels=st.lists(st.integers(0, L - 1), min_size=1, max_size=6),
    kind=st.sampled_from([ResidualShape, BottleneckShape, PairShape, LinearPairShape]),
    units=st.integers(8, 12),
    cardinality=st.booleans(),
    in_channels=st.integers(1, 9),
    stride=st.sampled_from([1, 2]),
    side=st.integers(4, 9),
    masked=st.booleans(),
)
def test_any_block_equals_the_reference(levels, kind, units, cardinality, in_channels, stride, side, masked):
    if kind is ResidualShape:
        shape = ResidualShape(in_channels, units, units, side, stride) if units >= in_channels else KINDS["residual"]
    elif kind is PairShape:
        shape = PairShape(in_channels, units, 5, side, (stride == 2, cardinality))
    elif kind is LinearPairShape:
        shape = LinearPairShape(in_channels, units, 5, side)
    else:
        shape = BottleneckShape(in_channels, 3 * units, 10, side, stride, units if cardinality else 1)
    block = make(shape).eval()
    x, levels, route = data(shape, levels, side=side)
    if masked:
        route = RoutingPlan.from_masks(route.selection()[:, None])[0]
    with torch.no_grad():
        y = block(x, route)
        close(y, reference_block(block, x, levels, L))
    assert y.shape == (len(levels), shape.channels, shape.size, shape.size)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", [False, True])
@residuals
def test_level_zero_is_exactly_the_shortcut(shape, first, training):
    block = make(shape, first=first).train(training)
    x, _, route = data(shape, [0, 2, 0])
    with torch.set_grad_enabled(training):
        y = block(x, route)
    shortcut = x if shape.stride == 1 else F.avg_pool2d(x, 2, ceil_mode=True)
    expected = F.pad(shortcut, (0, 0, 0, 0, 0, shape.channels - shape.in_channels))
    assert torch.equal(y[::2], expected[::2])
    assert not torch.equal(y[1], expected[1])


def test_level_zero_of_a_bottleneck_costs_nothing(monkeypatch):
    """No convolution sees the instance, and in place not one of its bytes is read or written."""
    block = make(KINDS["bottleneck"]).eval()
    x, _, route = data(KINDS["bottleneck"], [0, 3, 0, 1])
    x[::2] = torch.nan
    seen = []
    monkeypatch.setattr(_bottleneck_composed, "compute", lambda x, *others: seen.append(len(x)) or compute(x, *others))
    with torch.no_grad():
        y = block(x, route, inplace=True)
    assert y.data_ptr() == x.data_ptr()
    assert seen == [2, 2, 2]
    assert y[::2].isnan().all()
    assert y[1::2].isfinite().all()


@kinds
def test_the_lowest_level_of_a_pair_keeps_one_group_and_of_the_others_none(shape):
    groups = shape.groups(L)
    assert len(groups) == L - 1 + shape.lowest
    assert sum(groups) == shape.hidden
    assert all(size % shape.unit == 0 for size in groups)
    assert shape.widths(L)[0] == (groups[0] if shape.lowest else 0)


@kinds
def test_an_unselected_channel_leaves_no_trace(shape):
    block = make(shape).eval()
    x, _, route = data(shape, [1, 2, 1])
    width = shape.widths(L)[2]
    with torch.no_grad():
        before = block(x, route)
        *outputs, (last, _) = block.layers()
        for conv, _ in outputs:
            conv.weight[width:] = torch.nan
            if conv.bias is not None:
                conv.bias[width:] = torch.nan
        last.weight[:, width:] = torch.nan
        assert torch.equal(block(x, route), before)


@pytest.mark.parametrize("kind", ["residual", "cardinality"])
def test_statistics_ignore_instances_that_do_not_take_part(kind):
    shape = KINDS[kind]
    block, alone = make(shape).train(), make(shape).train()
    x, _, route = data(shape, [2, 0, 2, 0])
    x[1::2] = 1e6
    block(x, route)
    alone(x[::2].contiguous(memory_format=torch.channels_last), data(shape, [2, 2])[2])
    width, untouched = shape.widths(L)[2], make(shape)
    names = ("bn1", "bn2", "bn3") if kind == "cardinality" else ("bn1", "bn2")
    for name in names:
        close(getattr(block, name).running_mean, getattr(alone, name).running_mean)
        close(getattr(block, name).running_var, getattr(alone, name).running_var)
    for name in names[1:]:
        assert torch.equal(getattr(block, name).running_var[width:], getattr(untouched, name).running_var[width:])


@kinds
def test_full_training_needs_no_route(shape):
    block, other = make(shape).train(), make(shape).train()
    x, _, route = data(shape, [3] * 4)
    close(block(x), other(x, route))
    for mine, its in zip(block.buffers(), other.buffers(), strict=True):
        close(mine, its)


@kinds
def test_input_is_left_alone_unless_lent(shape):
    block = make(shape).eval()
    x, _, route = data(shape, [3, 0, 1])
    copy_of_x = x.clone()
    with torch.no_grad():
        expected = block(x, route)
        assert torch.equal(x, copy_of_x)
        assert torch.equal(block(x, route, inplace=True), expected)


def test_dropout_falls_on_both_fully_connected_layers_while_training():
    block = make(LinearPairShape(8, 32, 24, 2, dropout=0.5), torch.float64)
    x, levels, route = data(KINDS["fully connected"], LEVELS["mixed"], torch.float64)
    x = torch.randn(len(levels), 8, 2, 2, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (lambda: block.train()(x, route), lambda: reference_block(block.train(), x, levels, L)):
        torch.manual_seed(4)
        results.append(run())
    torch.testing.assert_close(*results)
    assert (results[0] == 0).double().mean() > 0.6  # ReLU alone: half
    torch.testing.assert_close(block.eval()(x, route), reference_block(block, x, levels, L))
    assert not torch.allclose(block(x, route), results[0])


@normed
def test_folded_weights_follow_the_parameters(shape):
    block = make(shape).eval()
    x, levels, route = data(shape, [3, 0, 1, 2])
    with torch.no_grad():
        before = block(x, route)
        assert block.folded() is block.folded()
        block.conv2.weight.mul_(2)
        block.bn2.running_var.mul_(3)
        after = block(x, route)
        close(after, reference_block(block, x, levels, L))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in KINDS.values()), (KINDS["cardinality"], torch.float16)],
    ids=[*KINDS, "float16"],
)
def test_half_precision_is_as_near_as_pytorch_itself(shape, dtype):
    """At most four times the error that the masked network in plain PyTorch makes in the same dtype."""
    exact, block = make(shape, torch.float64).eval(), make(shape, dtype).eval()
    x, levels, route = data(shape, LEVELS["mixed"], dtype)
    with torch.no_grad():
        expected = reference_block(exact, x.double(), levels, L)
        own = (reference_block(block, x, levels, L).double() - expected).abs().max()
        got = block(x, route)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= 4 * own


def test_weights_of_fully_connected_layers_are_read_anew_after_a_change():
    block = make(KINDS["fully connected, of one pixel"]).eval()
    x, levels, route = data(KINDS["fully connected, of one pixel"], [3, 0, 1, 2])
    with torch.no_grad():
        before = block(x, route)
        block.fc2.weight.mul_(2)
        after = block(x, route)
        close(after, reference_block(block, x, levels, L))
    assert not torch.allclose(after, before)


def test_initial_weights_of_fully_connected_layers_keep_the_size_of_what_they_read():
    """He's fan-in, as of the layers that are no block; biases from zero."""
    block = LinearPairShape(8, 128, 64, 4).build(L)
    for layer, fan_in in ((block.fc1, 128), (block.fc2, 128)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        assert not layer.bias.any()


def test_initial_weights_keep_the_size_of_what_flows_back():
    """He's fan-out: the outputs that an input reaches, of its own cardinality group alone, times 9 taps."""
    block = BottleneckShape(64, 256, 64, 8, stride=1, cardinality=8).build(L)
    for conv, fan_out in ((block.conv1, 256), (block.conv2, 32 * 9), (block.conv3, 64)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


BAD = {
    "stride": (
        lambda: BottleneckShape(8, 8, 8, 8, 3).build(L),
        "BottleneckBlock: stride must be 1 or 2 .* got stride 3",
    ),
    "shrinks": (lambda: BottleneckShape(8, 8, 4, 8, 1).build(L), "channels 4, in_channels 8"),
    "cardinality": (
        lambda: BottleneckShape(8, 128, 8, 8, 1, 2).build(L),
        "channels must be at least 256 in units of 64 for 4 levels, got 128",
    ),
    "thin pair": (lambda: PairShape(8, 4, 8, 8, (False, False)).build(L), "channels must be at least 8 for 4 levels"),
    "thin layers": (lambda: LinearPairShape(8, 4, 8, 1).build(L), "channels must be at least 8 for 4 levels, got 4"),
    "features": (
        lambda: LinearPairShape(8, 8, 8, 2).build(L)(torch.zeros(2, 8, 3, 3), torch.ones(2).long()),
        "dynamic_conv2d: x must have 32 channels",
    ),
    "one level": (lambda: PairShape(8, 8, 8, 8, (False, False)).build(1), "levels must be at least 2 .half and every"),
    "level": (lambda: plan_of_pairs(L), r"estimator: levels must be in 0..3, got 4"),
    "negative": (lambda: plan_of_pairs(-1), "estimator: levels must be in 0..3, got -1"),
}


@pytest.mark.parametrize(("make_it", "message"), BAD.values(), ids=BAD)
def test_impossible_blocks_and_levels_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
