"""Residual blocks for the checks on a GPU: random ones, folded, and the ways to compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_ways import composed_branch, fused_branch
from den.nn.blocks import ElasticBlock
from den_kernels import DynamicConv2d, ResidualWeights
from den_kernels.plan import Route
from den_kernels.rows import pool_rows
from den_kernels.testing import make_levels, make_mask
from tests.on_gpu import BATCH, DTYPES, Context


def random_norm(channels: int, like: type[nn.BatchNorm2d] = nn.BatchNorm2d, **keywords: Any) -> nn.BatchNorm2d:
    """With statistics and parameters that matter."""
    norm = like(channels, **keywords).eval()
    for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_var, 0.5, 2)):
        nn.init.uniform_(values, low, high)
    nn.init.normal_(norm.running_mean)
    return norm


def quarters(channels: int) -> tuple[int, int, int]:
    """Channel groups of a quarter, a quarter and a half."""
    return channels // 4, channels // 4, channels - 2 * (channels // 4)


def random_block(channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """conv1, bn1, conv2, bn2 of a pre-activation block; as many hidden channels as it reads, in `quarters`."""
    conv1 = DynamicConv2d(channels, channels, 3, stride, 1, bias=False, out_groups=quarters(channels))
    conv2 = DynamicConv2d(channels, out_channels, 3, 1, 1, bias=False, in_groups=quarters(channels))
    return conv1, random_norm(channels), conv2, random_norm(channels)


def fold(block: tuple[nn.Module, ...], dtype: torch.dtype, device: torch.device) -> ResidualWeights:
    """The block's weights in a dtype on a device; norms stay in float32, or float64 of those."""
    conv1, bn1, conv2, bn2 = (copy.deepcopy(module).to(device) for module in block)
    return ResidualWeights.fold(conv1.to(dtype), bn1, conv2.to(dtype), bn2)


def choose(selection: str, batch: int) -> Tensor:
    """Levels [B] or a mask [B, 3] of three groups; instance 1 chooses nothing."""
    chosen = make_mask(batch, 3, seed=2) if selection == "mask" else make_levels("uniform", batch, 3)
    chosen[1] = 0
    return chosen


def block_case(way: str, stride: int, selection: str, context: Context) -> tuple[tuple[nn.Module, ...], Tensor, Tensor]:
    """A block, x [B, C, H, W] on the CPU, and a selection in which instance 1 chooses nothing."""
    torch.manual_seed(0)
    channels, batch, side = context.size(64, 16), context.size(BATCH, 4), context.size(16, 6)
    block = random_block(channels, channels * stride, stride)
    x = torch.randn(batch, channels, side, side).to(DTYPES[way][0]).contiguous(memory_format=torch.channels_last)
    return block, x, choose(selection, batch)


def plain_case(
    context: Context, dtype: torch.dtype = torch.float32, stride: int = 1
) -> tuple[ElasticBlock, Tensor, Tensor]:
    """A block with statistics that matter, x, and levels, on the device."""
    torch.manual_seed(0)
    channels, batch, side = context.size(64, 16), context.size(BATCH, 4), context.size(16, 6)
    block = ElasticBlock(channels, channels * stride, 4, stride=stride)
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    x = torch.randn(batch, channels, side, side, device=context.place, dtype=dtype)
    return (
        block.to(context.place, dtype).eval(),
        x.contiguous(memory_format=torch.channels_last),
        make_levels("uniform", batch, 3).to(context.place),
    )


def onto_shortcut(branch: Callable[..., None]) -> Callable[[Tensor, Route, ResidualWeights], Tensor]:
    """The whole block: a way to add its branch, applied to its pooled shortcut."""

    def block(x: Tensor, route: Route, weights: ResidualWeights) -> Tensor:
        out = pool_rows(x, weights.conv2.shape[0], weights.stride)
        branch(x, out, route, weights)
        return out

    return block


composition, fused = onto_shortcut(composed_branch), onto_shortcut(fused_branch)
