"""All blocks of a trunk in one call: the bits of the blocks one after the other, however the batch is cut."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from den import Task, create_model
from den.nn.blocks import BottleneckBlock, ElasticBlock
from den.nn.blocks.bottleneck import BottleneckShape
from den_kernels import RoutingPlan, TrunkWeights, dynamic_trunk
from den_kernels._extension import extension
from den_kernels.dynamic_trunk import _block_by_block

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32(), reason="needs the extension on a CPU with AVX2"
)
DTYPES = (
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            extension is None or not extension.has_direct_bf16(), reason="needs a CPU with AVX-512 BF16"
        ),
    ),
)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Batch norms unlike new ones, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.3, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return module.eval()


def trunk(kinds: list[str], dtype: torch.dtype, norm: bool, channels: int = 16, seed: int = 0) -> TrunkWeights:
    """Blocks of those kinds: "b" basic, "B" basic with stride 2 and twice the channels, "n" bottleneck, "N" both."""
    torch.manual_seed(seed)
    blocks, size = [], 8
    for index, kind in enumerate(kinds):
        stride, wide = (2, 2 * channels) if kind.isupper() else (1, channels)
        if kind in "bB":
            blocks.append(ElasticBlock(channels, wide, 4, stride=stride, first=index == 0))
        else:
            blocks.append(BottleneckBlock(BottleneckShape(channels, 16, wide, size, stride), 4, first=index == 0))
        channels = wide
    folded = tuple(randomise(block, seed + 1).to(dtype).folded() for block in blocks)
    affine = (torch.rand(channels) + 0.5, torch.randn(channels)) if norm else (None, None)
    return TrunkWeights(folded, *affine)


def images(batch: int, weights: TrunkWeights, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    channels = weights.blocks[0].conv1.shape[1]
    x = torch.randn(batch, channels, size, size, generator=generator).to(weights.dtype)
    return x.contiguous(memory_format=torch.channels_last)


def plan_of(batch: int, blocks: int, seed: int = 0) -> RoutingPlan:
    generator = torch.Generator().manual_seed(seed)
    return RoutingPlan.from_levels(torch.randint(4, (batch, blocks), generator=generator), 3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    kinds=st.lists(st.sampled_from("bB"), min_size=1, max_size=4),
    batch=st.integers(0, 19),
    size=st.sampled_from((1, 3, 8, 16, 33)),
    seed=st.integers(0, 99),
)
def test_the_bits_of_one_block_after_the_other(dtype, kinds, batch, size, seed):
    weights = trunk(kinds, dtype, norm=False, seed=seed)
    assert weights.whole
    x, plan = images(batch, weights, size), plan_of(batch, len(kinds), seed)
    assert torch.equal(dynamic_trunk(x.clone(), plan, weights), _block_by_block(x.clone(), plan, weights))


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["n", "nN", "bnBN", "NNb"])
def test_bottlenecks_among_them(kinds):
    weights = trunk(list(kinds), torch.float32, norm=False)
    x, plan = images(11, weights), plan_of(11, len(kinds))
    assert weights.whole
    assert torch.equal(dynamic_trunk(x.clone(), plan, weights), _block_by_block(x.clone(), plan, weights))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_are_those_of_the_norm_and_the_mean(dtype):
    weights = trunk(list("bBb"), dtype, norm=True)
    x, plan = images(9, weights), plan_of(9, 3)
    got = dynamic_trunk(x.clone(), plan, weights)
    maps = dynamic_trunk(x.clone(), plan, TrunkWeights(weights.blocks)).double()
    wanted = (maps * weights.scale[:, None, None] + weights.shift[:, None, None]).relu().mean((2, 3))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@torch.no_grad()
def test_nan_in_an_image_stays_in_its_features():
    weights = trunk(list("bB"), torch.float32, norm=True)
    x, plan = images(6, weights), plan_of(6, 2)
    x[2, 3, 1, 1] = torch.nan
    got = dynamic_trunk(x.clone(), plan, weights)
    assert got.isnan().any(1).tolist() == [i == 2 for i in range(6)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kinds", "channels", "batch", "size"),
    [("bBbB", 16, 24, 16), ("bBb", 128, 9, 8), ("Bb", 128, 9, 8)],
    ids=["in chunks", "the last blocks shared", "all blocks large"],
)
def test_the_same_bits_whatever_the_chunks(kinds, channels, batch, size, dtype):
    """Permuted, one by one, with one thread and with several."""
    weights = trunk(list(kinds), dtype, norm=True, channels=channels)
    x, generator = images(batch, weights, size), torch.Generator().manual_seed(1)
    levels = torch.randint(4, (batch, len(kinds)), generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(dynamic_trunk(x.clone(), RoutingPlan.from_levels(levels, 3), weights))
            order = torch.randperm(batch, generator=torch.Generator().manual_seed(count))
            mixed = dynamic_trunk(x[order].clone(), RoutingPlan.from_levels(levels[order], 3), weights)
            results.append(mixed[order.argsort()])
            single = [
                dynamic_trunk(x[i : i + 1].clone(), RoutingPlan.from_levels(levels[i : i + 1], 3), weights)
                for i in range(batch)
            ]
            results.append(torch.cat(single))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_masks_and_other_dtypes_go_block_by_block():
    weights = trunk(list("bb"), torch.float32, norm=True)
    x, masks = images(5, weights), torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    got = dynamic_trunk(x.clone(), RoutingPlan.from_masks(masks), weights)
    assert got.shape == (5, 16)
    levels = masks.int().cumprod(2).sum(2)  # of prefixes
    prefixes = torch.arange(3) < levels[..., None]
    torch.testing.assert_close(
        dynamic_trunk(x.clone(), RoutingPlan.from_masks(prefixes), weights),
        dynamic_trunk(x.clone(), RoutingPlan.from_levels(levels, 3), weights),
    )


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda x, p, w: (x[0], p, w), ValueError, r"x must be \[B, C, H, W\]"),
        (lambda x, p, w: (x[:, :8], p, w), ValueError, "dynamic_trunk: x must be"),
        (lambda x, p, w: (x.double(), p, w), TypeError, "x must be torch.float32"),
        (lambda x, p, w: (x[:2], p, w), ValueError, "plan must be of 2 instances and 2 blocks, got 4 and 2"),
        (lambda x, p, w: (x, plan_of(4, 3), w), ValueError, "got 4 and 3"),
        (lambda x, p, w: (x, RoutingPlan.from_levels(torch.full((4, 2), 9), 9), w), ValueError, "levels must be"),
        (lambda x, p, w: (x.requires_grad_(), p, w), ValueError, "must not require a gradient"),
        (lambda x, p, w: (x, p, TrunkWeights(w.blocks[:1] * 2, w.scale[:3], w.shift)), ValueError, "scale must be"),
        (lambda x, p, w: (x, p, TrunkWeights(w.blocks[::-1])), ValueError, "input channels must be"),
    ],
)
def test_what_does_not_fit_is_refused(damage, error, words):
    weights = trunk(list("bB"), torch.float32, norm=True)
    with pytest.raises(error, match=words):
        dynamic_trunk(*damage(images(4, weights), plan_of(4, 2), weights))


NETWORKS = ("wrn8_1", "wrn14_1", "resnet50_bottleneck", "vgg16")


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 6])
def test_networks_take_it_by_themselves(name, batch, monkeypatch):
    model = randomise(create_model(name, tasks=[Task("a", 5, 32)], levels=3), 0)
    estimator, x = model.estimator, torch.randn(batch, 3, 32, 32)
    levels = torch.randint(3, (batch, model.num_blocks))
    calls = []
    monkeypatch.setattr("den.nn.estimator.dynamic_trunk", lambda *given: calls.append(1) or dynamic_trunk(*given))
    monkeypatch.setattr("den.nn.estimator.Estimator.one_call", lambda self, batch: None)  # which has a trunk inside
    got = estimator(x, "a", levels)
    frozen = copy.deepcopy(model).freeze().estimator(x, "a", levels)
    assert len(calls) == (0 if name == "vgg16" else 2)
    monkeypatch.setattr("den.nn.estimator.Estimator._folded_trunk", lambda self, on_cpu: None)
    wanted = estimator(x, "a", levels)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.blocks[1].conv2.weight.mul_(2),
        lambda e: e.blocks[0].conv1.weight.data.mul_(2),
        lambda e: e.blocks[2].bn2.running_var.numpy().__imul__(4),
        lambda e: setattr(e.blocks[2].bn1, "eps", 0.5),
        lambda e: setattr(e.norm, "eps", 0.5),
        lambda e: e.norm.bias.add_(1),
        lambda e: e.load_state_dict({name: value * 1.5 for name, value in e.state_dict().items()}),
    ],
    ids=["in place", "data", "numpy", "eps", "eps of the last norm", "last norm", "load_state_dict"],
)
def test_changed_weights_are_noticed(change):
    model = randomise(create_model("wrn8_1", tasks=[Task("a", 5, 32)], levels=3), 0)
    estimator, x = model.estimator, torch.randn(4, 3, 32, 32)
    levels = torch.randint(1, 3, (4, model.num_blocks))
    before = estimator(x, "a", levels)
    change(estimator)
    after = estimator(x, "a", levels)
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(estimator)(x, "a", levels))


@torch.no_grad()
def test_hooks_of_a_block_are_called():
    model = randomise(create_model("wrn8_1", tasks=[Task("a", 5, 32)], levels=3), 0)
    estimator, x, seen = model.estimator, torch.randn(2, 3, 32, 32), []
    levels = torch.full((2, model.num_blocks), 2)
    whole = estimator(x, "a", levels)
    hook = estimator.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(estimator(x, "a", levels), whole, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    hook.remove()
    estimator(x, "a", levels)
    assert len(seen) == 1
