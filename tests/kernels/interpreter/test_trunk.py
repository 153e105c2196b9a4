"""A trunk as a GPU runs it, block by block with the activated map handed on, against the blocks' references."""

import pytest
import torch
from torch import nn

from den_kernels import BottleneckWeights, DynamicConv2d, ResidualWeights, RoutingPlan, _trunk_gpu
from den_kernels._triton import norm, residual
from den_kernels.dynamic_bottleneck import dynamic_bottleneck_reference
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import as_route
from den_kernels.rows import pool_rows
from tests.oracle import unlike_new

GROUPS = (16, 16)
close = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.05, "atol": 0.1}}


def fold(kind: str, channels: int, first: bool, dtype: torch.dtype):
    """A block: "b" basic, "n" bottleneck of cardinality 2, capital: with stride 2 and twice the channels."""
    stride, wide = (2, 2 * channels) if kind.isupper() else (1, channels)
    M = sum(GROUPS)
    if kind in "bB":
        conv1 = DynamicConv2d(channels, M, 3, stride, 1, bias=False, out_groups=GROUPS)
        parts = [conv1, nn.BatchNorm2d(channels), nn.Conv2d(M, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(M)]
        make = ResidualWeights.fold
    else:
        conv1 = DynamicConv2d(channels, M, 1, bias=False, out_groups=GROUPS)
        conv2 = nn.Conv2d(M, M, 3, stride, 1, 1, 2, bias=False)
        conv3 = nn.Conv2d(M, wide, 1, bias=False)
        norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(M), nn.BatchNorm2d(M)
        parts = [conv1, norms[0], conv2, norms[1], conv3, norms[2]]
        make = BottleneckWeights.fold
    parts = [unlike_new(part).eval().to(dtype) for part in parts]
    if first:
        parts[1] = None
    return make(*parts)


def trunk(kinds: str, dtype: torch.dtype, channels: int = 16) -> list:
    torch.manual_seed(0)
    blocks = []
    for i, kind in enumerate(kinds):
        blocks.append(fold(kind, channels, i == 0, dtype))
        channels *= 2 if kind.isupper() else 1
    return blocks


@torch.no_grad()
@pytest.mark.parametrize(
    ("kinds", "selection", "dtype"),
    [("bB", "levels", torch.bfloat16), ("nNb", "levels", torch.bfloat16), ("bN", "masks", torch.float32)],
)
def test_the_blocks_one_after_the_other(kinds, selection, dtype, monkeypatch):
    blocks = trunk(kinds, dtype)
    levels = torch.tensor([[2, 0, 1, 2], [0, 2, 0, 0], [1, 1, 2, 1], [0, 0, 0, 0]])[:, : len(blocks)]
    masks = torch.arange(2) < levels[..., None]
    plan = RoutingPlan.from_masks(masks) if selection == "masks" else RoutingPlan.from_levels(levels, 2)
    x = torch.randn(4, 16, 5, 6).relu().to(dtype).contiguous(memory_format=torch.channels_last)
    C = blocks[-1].out_channels
    scale, shift = torch.rand(C) + 0.5, torch.randn(C)
    expected = x
    for block, route in zip(blocks, plan, strict=True):
        basic = isinstance(block, ResidualWeights)
        expected = (dynamic_residual_reference if basic else dynamic_bottleneck_reference)(expected, route, block)
    passes = []
    monkeypatch.setattr(residual, "activate", lambda *given: passes.append(given) or norm.activate(*given))
    got = _trunk_gpu.run(x.clone(memory_format=torch.channels_last), tuple(plan), blocks, None, None)
    torch.testing.assert_close(got, expected, **close[dtype])
    assert len(passes) == (0 if dtype == torch.bfloat16 else len(blocks) - 1)  # float32: the pass writes it
    pooled = _trunk_gpu.run(x.clone(memory_format=torch.channels_last), tuple(plan), blocks, scale, shift)
    wanted = (got.float() * scale[:, None, None] + shift[:, None, None]).relu().mean((2, 3))
    torch.testing.assert_close(pooled, wanted.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "size", "dtype"),
    [("b", (5, 3), torch.bfloat16), ("B", (1, 4), torch.float32), ("N", (5, 3), torch.bfloat16)],
)
def test_the_last_launch_pools_the_shortcut_itself(kind, size, dtype):
    """The bits of the shortcut at level 0; its sum with the branch as where the shortcut was there before."""
    (block,) = trunk(kind, dtype)
    route = as_route(torch.tensor([0, 2, 1]), 2, 3)
    x = torch.randn(3, 16, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    before = pool_rows(x, block.out_channels, block.stride)
    out, alone = torch.full_like(before, torch.nan), before.clone(memory_format=torch.channels_last)
    after = residual.Next(torch.rand(before.shape[1]), torch.randn(before.shape[1]), torch.tensor([1, 0, 2]).int())
    activated = residual.add_branch(x, out, route, block, following=after, holds_shortcut=False)
    residual.add_branch(x, alone, route, block)
    assert torch.equal(out[0], before[0])
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=4e-2 if dtype == torch.bfloat16 else 1e-5)
    assert activated[1].isnan().all()
    wanted = (out.float() * after.scale[:, None, None] + after.shift[:, None, None]).relu().to(dtype)
    assert torch.equal(activated[[0, 2]], wanted[[0, 2]])
