"""Folded weights of blocks and stems: never stale, never shared; stems of any size; frozen networks."""

import copy

import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from den.nn.blocks import ElasticBlock, ResidualShape
from den.nn.ends import ConvNormReLU, Stem, stem_geometry
from den.nn.model import create_model
from den.nn.reference import reference_block
from den.nn.tasks import Task
from den_kernels import RoutingPlan
from den_kernels._extension import extension
from den_kernels.fold_cache import FoldCache
from tests.oracle import unlike_new

L = 4
SHAPE = ResidualShape(16, 16, 16, 8, stride=1)


def make():
    """A block whose every norm has its own weight, bias and statistics."""
    torch.manual_seed(0)
    return unlike_new(SHAPE.build(L))


def data(levels, seed=1):
    x = torch.randn(len(levels), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    levels = torch.tensor(levels, dtype=torch.int32)
    route = RoutingPlan.from_levels(levels[:, None], groups=L - 1)[0]
    return x.contiguous(memory_format=torch.channels_last), levels, route


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


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
        x, _, route = data([3, 1, 2], seed=5)
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
    x, levels, route = data([3, 0, 1, 2])
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
    x, levels, route = data([3, 0, 1, 2])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_block_may_read_its_parameters_in_place(dtype):
    block = unlike_new(ResidualShape(256, 8, 256, 8, stride=1).build(L)).eval().to(dtype)
    _, _, route = data([0, 1, 2, 3])
    x = torch.randn(4, 256, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    default, usual = block.folded(), block(x, route)
    if default.direct is None:
        pytest.skip("no direct kernel runs on this CPU: nothing is packed")
    found = {}
    for choice in (True, False):
        block.in_place = choice
        found[choice] = block.folded().unpacked
        torch.testing.assert_close(
            block(x, route).float(), usual.float(), rtol=3e-2, atol=3e-2 * usual.abs().max().item()
        )
    reads = dtype == torch.float32 or extension.bf16_isa() == "AVX-512 BF16"
    assert found == {True: (reads, reads), False: (False, False)}
    assert default.unpacked == found[dtype == torch.float32]


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
