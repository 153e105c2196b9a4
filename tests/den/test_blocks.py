"""The elastic block against the strict reference: masked after the activation, statistics of the users alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from den.nn.blocks import ElasticBlock
from den.nn.conv_norm import ConvNormReLU
from den.nn.model import create_model
from den.nn.reference import reference_block
from den.nn.stem import Stem, stem_geometry
from den.nn.tasks import Task
from den_kernels import RoutingPlan
from den_kernels.fold_cache import FoldCache

L = 4
KINDS = {
    "inner": {"in_channels": 16, "channels": 16},
    "first": {"in_channels": 16, "channels": 16, "first": True},
    "first grows": {"in_channels": 8, "channels": 16, "first": True},
    "grows": {"in_channels": 8, "channels": 20},
    "downsamples": {"in_channels": 8, "channels": 16, "stride": 2},
    "same width, half map": {"in_channels": 16, "channels": 16, "stride": 2},
}
LEVELS = {
    "mixed": [3, 0, 1, 2, 2, 0, 3, 1],
    "all at level 0": [0] * 5,
    "full": [3] * 4,
    "one at level 1": [0, 0, 1, 0],
    "one instance": [2],
}


def make(kind="inner", dtype=torch.float32):
    """A block whose every norm has its own weight, bias and statistics."""
    torch.manual_seed(0)
    block = ElasticBlock(levels=L, **KINDS[kind])
    with torch.no_grad():
        for norm in filter(None, (block.bn1, block.bn2)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)
    return block.to(dtype)


def data(block, levels, side=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(levels), block.conv1.in_channels, side, side, generator=generator)
    x = x.to(block.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
    levels = torch.tensor(levels, dtype=torch.int32)
    return x, levels, RoutingPlan.from_levels(levels[:, None], groups=L - 1)[0]


def named(name):
    return lambda text: f"{name}: {text}"


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("side", [8, 7, 1])
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_inference_equals_the_reference(kind, levels, side):
    block = make(kind).eval()
    x, levels, route = data(block, levels, side)
    expected = reference_block(block, x, levels, L).detach()
    close(block(x, route).detach(), expected)
    with torch.no_grad():
        fast = block(x, route)
    close(fast, expected)
    assert fast.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("levels", [LEVELS[name] for name in ("mixed", "all at level 0", "full")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_the_reference_with_gradients_and_statistics(kind, levels):
    block = make(kind, torch.float64).train()
    oracle = copy.deepcopy(block)
    x, levels, route = data(block, levels)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = block(mine, route), reference_block(oracle, its, levels, L)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, its.grad, rtol=1e-8, atol=1e-8)
    for (name, parameter), other in zip(block.named_parameters(), oracle.parameters(), strict=True):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, other.grad, rtol=1e-8, atol=1e-8, msg=named(name))
    for (name, buffer), other in zip(block.named_buffers(), oracle.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-9, msg=named(name))


def test_full_training_needs_no_route():
    block, other = make("downsamples").train(), make("downsamples").train()
    x, _, route = data(block, [3] * 4)
    close(block(x), other(x, route))
    close(block.bn2.running_var, other.bn2.running_var)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_level_zero_is_exactly_the_shortcut(kind, training):
    block = make(kind).train(training)
    x, _, route = data(block, [0, 2, 0])
    with torch.set_grad_enabled(training):
        y = block(x, route)
    shortcut = x if block.stride == 1 else F.avg_pool2d(x, 2, ceil_mode=True)
    expected = torch.cat([shortcut, shortcut.new_zeros(3, y.shape[1] - x.shape[1], *y.shape[2:])], 1)
    assert torch.equal(y[0], expected[0])
    assert torch.equal(y[2], expected[2])
    assert not torch.equal(y[1], expected[1])


def test_an_unselected_channel_leaves_no_trace():
    block = make().eval()
    x, _, route = data(block, [1, 2, 1])
    with torch.no_grad():
        before = block(x, route)
        block.conv1.weight[8:] = torch.nan  # beyond level 2
        block.conv2.weight[:, 8:] = torch.nan
        assert torch.equal(block(x, route), before)


def test_statistics_ignore_instances_that_do_not_take_part():
    block, alone = make().train(), make().train()
    x, _, route = data(block, [2, 0, 2, 0])
    _, _, alone_route = data(block, [2, 2])
    x[1::2] = 1e6
    block(x, route)
    alone(x[::2].contiguous(memory_format=torch.channels_last), alone_route)
    for norm in ("bn1", "bn2"):
        close(getattr(block, norm).running_mean, getattr(alone, norm).running_mean)
        close(getattr(block, norm).running_var, getattr(alone, norm).running_var)
    untouched = make().bn2
    assert torch.equal(block.bn2.running_mean[8:], untouched.running_mean[8:])
    assert torch.equal(block.bn2.running_var[8:], untouched.running_var[8:])


@pytest.mark.parametrize("kind", ["inner", "downsamples"])
def test_input_is_left_alone_unless_lent(kind):
    block = make(kind).eval()
    x, _, route = data(block, [3, 0, 1])
    copy_of_x = x.clone()
    with torch.no_grad():
        expected = block(x, route)
        assert torch.equal(x, copy_of_x)
        assert torch.equal(block(x, route, inplace=True), expected)


def changes():
    """Every ordinary way in which a model's numbers change."""

    def sgd(block):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    def load(block):
        block.load_state_dict({name: value + 1 for name, value in block.state_dict().items()})

    def in_place(block):
        with torch.no_grad():
            block.conv2.weight.mul_(2)

    def inference_in_place(block):
        with torch.inference_mode():
            block.bn1.running_mean.add_(1)

    def statistics(block):
        x, _, route = data(block, [3, 1, 2], seed=5)
        block.train()
        block(x * 3 + 1, route)
        block.eval()

    def replaced_twice(block):
        for _ in range(2):  # the second could land where the first was
            block.conv1.weight.data = torch.randn_like(block.conv1.weight)

    def new_parameter(block):
        block.bn2.weight = torch.nn.Parameter(torch.full_like(block.bn2.weight, 3))

    def write_unseen_in_training(block):
        block.train()
        block.conv1.weight.data.mul_(2)
        block.eval()

    return [
        sgd, load, in_place, inference_in_place, statistics, replaced_twice, new_parameter, write_unseen_in_training,
    ]  # fmt: skip


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_folded_weights_are_never_stale(change):
    block = make().eval()
    x, levels, route = data(block, [3, 0, 1, 2])
    with torch.no_grad():
        before = block(x, route)
        assert block.folded() is block.folded()
    change(block)
    with torch.no_grad():
        after = block(x, route)
    close(after, reference_block(block, x, levels, L).detach())
    assert not torch.allclose(after, before)


def test_a_cache_keeps_the_address_it_knows_from_being_given_away():
    cache, source = FoldCache(), torch.nn.Parameter(torch.zeros(1000))
    assert cache.get((source,), lambda: "zeros") == "zeros"
    address = source.data_ptr()
    source.data = torch.ones(1000)
    others = [torch.empty(1000) for _ in range(50)]
    assert address not in {other.data_ptr() for other in others}
    assert cache.get((source,), lambda: "ones") == "ones"


@pytest.mark.parametrize("wrap", [weight_norm, prune.identity], ids=["parametrized", "pruned"])
def test_a_cache_follows_parameters_that_are_moved_away(wrap):
    conv, cache = torch.nn.Conv2d(2, 2, 1), FoldCache()
    assert cache.of((conv,), lambda: "own") == "own"
    wrap(conv, "weight")
    assert cache.of((conv,), lambda: "moved") == "moved"
    moved = next(p for name, p in conv.named_parameters() if name != "bias")
    with torch.no_grad():
        moved.mul_(2)
    assert cache.of((conv,), lambda: "changed") == "changed"
    assert cache.of((conv,), lambda: "built again") == "changed"


def test_a_copy_of_a_warm_block_is_independent():
    block = make().eval()
    x, levels, route = data(block, [3, 0, 1, 2])
    with torch.no_grad():
        before = block(x, route)
        twin = copy.deepcopy(block)
        twin.conv1.weight.zero_()
        assert torch.equal(block(x, route), before)
        close(twin(x, route), reference_block(twin, x, levels, L).detach())


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="stride must be 1 or 2 and channels at least in_channels, got stride 3"):
        ElasticBlock(8, 8, L, stride=3)
    with pytest.raises(ValueError, match="channels 4, in_channels 8"):
        ElasticBlock(8, 4, L)


@pytest.mark.parametrize("trunk", [4, 7, 16, 28, 32])
def test_stems_reach_the_trunk_exactly_from_every_size(trunk):
    for size in range(trunk, 12 * trunk):
        stride, padding = stem_geometry(size, trunk)
        assert stride == -(-size // trunk)
        assert (size + 2 * padding - 7) // stride + 1 == trunk


@pytest.mark.parametrize("size", [8, 15, 16, 17, 28, 100])
def test_a_stem_brings_any_image_to_the_trunk(size):
    stem = Stem(Task("any", 2, size), 8, 16)
    y = stem(torch.randn(3, 3, size, size))
    assert y.shape == (3, 8, 16, 16)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y >= 0).all()
    assert stem(torch.randn(0, 3, size, size)).shape == (0, 8, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folded_convolution_equals_convolution_and_norm(dtype):
    torch.manual_seed(0)
    layer = ConvNormReLU(5, 8, 3, 2, 1)
    for _ in range(3):
        layer(torch.randn(4, 5, 9, 9) * 2 + 1)
    layer = layer.eval().to(dtype)
    x = torch.randn(4, 5, 9, 9).to(dtype)
    plain = layer(x).detach()
    with torch.no_grad():
        folded = layer(x)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(folded, plain, rtol=tolerance, atol=tolerance)


def test_an_empty_batch_leaves_statistics_alone():
    layer = ConvNormReLU(3, 4, 3, 1, 1).train()
    assert layer(torch.zeros(0, 3, 5, 5)).shape == (0, 4, 5, 5)
    assert torch.equal(layer.norm.running_var, torch.ones(4))
    assert torch.equal(layer.norm.running_mean, torch.zeros(4))


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    return create_model("wrn8_1", [Task("a", 3, 16)], trunk_size=16).eval()


def test_a_frozen_network_computes_the_same_from_less_memory(small_model):
    images, levels = torch.randn(5, 3, 16, 16), torch.randint(4, (5, small_model.num_blocks))
    with torch.no_grad():
        expected = small_model.estimator(images, "a", levels)
        assert torch.equal(small_model.freeze().estimator(images, "a", levels), expected)
    runs_direct = small_model.estimator.blocks[0]._frozen is not None
    kept = sum(block.conv1.weight.untyped_storage().nbytes() for block in small_model.estimator.blocks)
    whole = sum(block.conv1.weight.numel() * 4 for block in small_model.estimator.blocks)
    assert kept == (4 * small_model.num_blocks if runs_direct else whole)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model: model.train(), "must stay in eval mode"),
        (lambda model: model.state_dict(), "must not be frozen"),
        (lambda model: model(torch.zeros(2, 3, 16, 16), "a"), "without gradients"),
    ],
)
def test_a_frozen_network_refuses_what_it_cannot_do(small_model, use, message):
    if small_model.freeze().estimator.blocks[0]._frozen is None:
        pytest.skip("no direct kernel runs on this CPU: freezing changes nothing")
    with pytest.raises(ValueError, match=message):
        use(small_model)
