"""Trunks with convolutions as shortcuts: the blocks one after the other, however the batch is cut."""

import pytest
import torch
from torch import nn

from den_kernels import BottleneckWeights, DynamicConv2d, ResidualWeights, RoutingPlan, TrunkWeights, dynamic_trunk
from den_kernels._extension import extension
from den_kernels.dynamic_trunk import _block_by_block
from den_kernels.projection import Projection
from tests.oracle import unlike_new

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32(), reason="needs the extension on a CPU with AVX2"
)
HALF = pytest.mark.skipif(extension is None or not extension.has_direct_bf16(), reason="needs a CPU with AVX-512 BF16")
# channels, output channels, stride, side of the shortcut's kernel (0: the input itself)
BASIC = ((16, 16, 1, 0), (16, 32, 2, 1), (32, 32, 1, 0), (32, 32, 1, 1), (32, 48, 2, 3))


def basic(C: int, O: int, stride: int) -> ResidualWeights:
    conv1 = DynamicConv2d(C, O, 3, stride, 1, bias=False, out_groups=(O // 4, O // 4, O // 2))
    layers = unlike_new(nn.ModuleList([conv1, nn.BatchNorm2d(O), nn.Conv2d(O, O, 3, 1, 1), nn.BatchNorm2d(O)])).eval()
    return ResidualWeights.fold(*layers, post_activation=True)


def bottleneck(C: int, O: int, stride: int) -> BottleneckWeights:
    conv1 = DynamicConv2d(C, 64, 1, bias=False, out_groups=(16, 16, 32))
    convs = conv1, nn.Conv2d(64, 64, 3, stride, 1, groups=16), nn.Conv2d(64, O, 1)
    pairs = (part for conv in convs for part in (conv, nn.BatchNorm2d(conv.out_channels)))
    return BottleneckWeights.fold(*unlike_new(nn.ModuleList(pairs)).eval(), post_activation=True)


def trunk(make, dtype: torch.dtype = torch.float32) -> TrunkWeights:
    """The blocks of `BASIC`, all with a ReLU behind the sum."""
    torch.manual_seed(0)
    blocks, shortcuts = [], []
    for C, O, stride, side in BASIC:
        weights = make(C, O, stride)
        blocks.append(weights)
        shortcuts.append(Projection.of(nn.Conv2d(C, O, side, stride, side // 2).to(dtype)) if side else None)
    return TrunkWeights(tuple(blocks), shortcuts=tuple(shortcuts))


def half(make):
    """`make` in bfloat16."""

    def made(C: int, O: int, stride: int):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return make(C, O, stride)
        finally:
            torch.set_default_dtype(default)

    return made


def problem(batch: int, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (13, 10)):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 16, *size, generator=generator).relu().to(dtype)
    levels = torch.randint(4, (batch, len(BASIC)), generator=generator)
    return x.contiguous(memory_format=torch.channels_last), levels


@torch.no_grad()
@pytest.mark.parametrize("make", [basic, bottleneck])
@pytest.mark.parametrize("batch", [0, 1, 9])
def test_the_blocks_one_after_the_other(make, batch):
    weights = trunk(make)
    x, levels = problem(batch)
    plan = RoutingPlan.from_levels(levels, 3)
    assert weights.whole
    got, wanted = dynamic_trunk(x.clone(), plan, weights), _block_by_block(x.clone(), plan, weights)
    assert got.shape == (batch, 48, 4, 3)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item() if batch else 1))


@torch.no_grad()
@HALF
def test_in_bfloat16():
    weights = trunk(half(basic), torch.bfloat16)
    x, levels = problem(6, torch.bfloat16)
    plan = RoutingPlan.from_levels(levels, 3)
    got, wanted = (run(x.clone(), plan, weights).float() for run in (dynamic_trunk, _block_by_block))
    assert (got - wanted).abs().max() <= 2**-6 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("make", [basic, bottleneck])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_neither_threads_nor_neighbours_change_a_bit(make, batch):
    weights = trunk(make)
    x, levels = problem(batch, size=(40, 40))
    plan, threads = RoutingPlan.from_levels(levels, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = dynamic_trunk(x.clone(), plan, weights)
        alone = [
            dynamic_trunk(x[i : i + 1].clone(), RoutingPlan.from_levels(levels[i : i + 1], 3), weights)
            for i in range(batch)
        ]
        assert torch.equal(torch.cat(alone), wanted)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(dynamic_trunk(x.clone(), plan, weights), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("conv", "runs"),
    [
        (nn.Conv2d(16, 32, 1, 2), True),
        (nn.Conv2d(16, 32, 3, 2, 1, bias=False), True),
        (nn.Conv2d(16, 32, 3, 2), False),
        (nn.Conv2d(16, 32, 2, 2), False),
        (nn.Conv2d(16, 32, 1, (2, 1)), False),
        (nn.Conv2d(16, 32, 1, groups=2), False),
        (nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"), False),
    ],
)
def test_which_convolutions_it_runs(conv, runs):
    found = Projection.of(conv)
    assert (found is not None) == runs
    if found is not None:
        x = torch.randn(2, 16, 5, 5)
        torch.testing.assert_close(found(x), conv(x))


@pytest.mark.parametrize(
    ("shortcuts", "words"),
    [
        ((None,), "shortcuts must be one for each of 2 blocks or none, got 1"),
        ((Projection.of(nn.Conv2d(16, 32, 1)), None), "shortcuts must be of their blocks' channels and stride"),
        ((None, Projection.of(nn.Conv2d(32, 32, 1, 2))), "shortcuts must be of their blocks' channels and stride"),
        ((None, Projection.of(nn.Conv2d(32, 32, 1).bfloat16())), "shortcuts must be of the blocks' dtype"),
    ],
)
def test_what_does_not_fit_is_refused(shortcuts, words):
    torch.manual_seed(0)
    blocks = basic(16, 32, 2), basic(32, 32, 1)
    with pytest.raises(ValueError, match=words):
        _ = TrunkWeights(blocks, shortcuts=shortcuts).handle
