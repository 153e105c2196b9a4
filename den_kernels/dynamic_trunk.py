"""The residual blocks of a whole trunk at inference, in one call.

Equivalent to the blocks one after the other, each over the hidden channels that an instance selected for it

    for weights in blocks: x = shortcut(x) + branch(x)        of a post-activation block relu of it, for x >= 0 or
                                                              a convolution as its shortcut
    features = relu(x * scale + shift).mean((2, 3))

(Ahn, Kim, Oh, ICCV 2019, section 3.1). On a CPU that is one call of C++ (csrc/dynamic_trunk.cpp). Instances do not
depend on each other at inference: a chunk of them is one thread's work through all blocks, with no wait between blocks,
so that a thread that loses its core delays nobody. The result does not depend on how the batch is cut. On a GPU a block
writes, beside its result, what the next one reads of it (`_trunk_gpu.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import _triton, _trunk_gpu
from ._extension import extension
from ._handle import HasHandle
from .bottleneck_weights import BottleneckWeights
from .dynamic_bottleneck import dynamic_bottleneck, dynamic_bottleneck_
from .dynamic_residual import dynamic_residual, dynamic_residual_
from .eager import in_range, not_scriptable, refuse_symbols, refuse_training, runs_eagerly
from .plan import RoutingPlan
from .projection import Projection
from .residual_weights import ResidualWeights

_OP = "dynamic_trunk"
_NAME = f"den_kernels::{_OP}"
Block = ResidualWeights | BottleneckWeights


@dataclass(frozen=True)
class TrunkWeights(HasHandle):
    """The folded weights of N blocks in their order, at least one, and of the batch norm behind the last one.

    scale, shift: float32 [C] of that norm as an affine map; None: the trunk's result is the last block's map.
    shortcuts: of each block its shortcut's convolution (`den_kernels.projection`), or None: x, pooled and widened; ():
    None for all.
    """

    blocks: tuple[Block, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    shortcuts: tuple[Projection | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError(f"{_OP}: blocks must be at least one, got none")
        if self.shortcuts and len(self.shortcuts) != len(self.blocks):
            raise ValueError(
                f"{_OP}: shortcuts must be one for each of {len(self.blocks)} blocks or none, got {len(self.shortcuts)}"
            )
        for conv in self.shortcuts:  # before a weight is packed: not every CPU packs every dtype
            if conv is not None and conv.weight.dtype != self.dtype:
                raise ValueError(
                    f"{_OP}: shortcuts must be of the blocks' dtype, {self.dtype}, got {conv.weight.dtype}"
                )

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object, `extension.Trunk`; ValueError for blocks that do not follow one another."""
        convs = [None if conv is None else conv.handle for conv in self.shortcuts]
        return extension.Trunk([block.handle for block in self.blocks], self.scale, self.shift, convs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the maps."""
        return self.blocks[0].conv1.dtype

    @cached_property
    def whole(self) -> bool:
        """True where one call runs all blocks: a direct kernel runs each of them."""
        return all(block.direct is not None for block in self.blocks) and self._alike

    @cached_property
    def _alike(self) -> bool:
        """True where all blocks have one dtype and device."""
        kinds = {(block.conv1.dtype, block.conv1.device) for block in self.blocks}
        return len(kinds) == 1

    @cached_property
    def _plain(self) -> bool:
        """True where no block has what Triton knows nothing of: a ReLU behind it, a bias of its third convolution, or a
        convolution as its shortcut."""
        if any(conv is not None for conv in self.shortcuts):
            return False
        return not any(block.relu or getattr(block, "bias3", None) is not None for block in self.blocks)

    def runs_on_gpu(self, x: Tensor) -> bool:
        """True where one call runs all blocks on x [B, C, H, W], which is not on a CPU."""
        return self._alike and self._plain and _triton.takes(x)

    def shapes(self, height: int, width: int) -> Iterator[tuple[int, int, int]]:
        """[C_out, H_out, W_out] of each block that changes its map's shape or has a convolution as its shortcut."""
        for block, conv in self._with_shortcuts():
            out_channels, channels = _channels(block)
            height, width = -(-height // block.stride), -(-width // block.stride)
            if conv is not None or block.stride > 1 or out_channels > channels:
                yield out_channels, height, width

    def _with_shortcuts(self) -> Iterator[tuple[Block, Projection | None]]:
        return zip(self.blocks, self.shortcuts or (None,) * len(self.blocks), strict=True)


def _channels(block: Block) -> tuple[int, int]:
    """C_out and C of a block."""
    last = block.conv2 if isinstance(block, ResidualWeights) else block.conv3
    return last.shape[0], block.conv1.shape[1]


@not_scriptable
def dynamic_trunk(
    x: Tensor,  # [B, C, H, W]
    plan: RoutingPlan,  # of N blocks
    weights: TrunkWeights,
) -> Tensor:  # [B, C_out, H_out, W_out], or [B, C_out] with a norm behind the last block
    """Run all blocks of a trunk for inference; may write over `x`.

    One call on a CPU where `weights.whole` and the plan is one of levels, on a GPU where Triton runs; else block by
    block, with the same values.

    Raises ValueError for a plan of other blocks, instances or groups, for blocks that do not follow one another, for
    another device, for `x` that requires a gradient, and inside torch.func; TypeError for another dtype.
    """
    refuse_symbols(_OP, x)
    refuse_training(_OP, x=x)
    _check(x, plan, weights)
    if not runs_eagerly(x) or not (weights.whole and plan.masks is None if x.is_cpu else weights.runs_on_gpu(x)):
        return _block_by_block(x, plan, weights)
    if x.is_cpu:
        return in_range(_NAME, _run, x, plan, weights)
    return in_range(_NAME, _trunk_gpu.run, x, tuple(plan), weights.blocks, weights.scale, weights.shift)


def _check(x: Tensor, plan: RoutingPlan, weights: TrunkWeights) -> None:
    """Raise unless x is [B, C, H, W], and plan and weights are of the same blocks, instances and device."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{_OP}: x must be [B, C, H, W] with at least one pixel, got {list(x.shape)}")
    expected = x.shape[0], len(weights.blocks)
    if (plan.batch_size, len(plan)) != expected:
        raise ValueError(
            f"{_OP}: plan must be of {expected[0]} instances and {expected[1]} blocks, "
            f"got {plan.batch_size} and {len(plan)}"
        )
    if plan.levels.device != x.device:
        raise ValueError(f"{_OP}: plan must be on {x.device} as x is, got {plan.levels.device}")
    if x.dtype != weights.dtype:
        raise TypeError(f"{_OP}: x must be {weights.dtype} as the weights are, got {x.dtype}")
    if x.is_cpu:
        return  # the kernel's own object and the blocks' ops check the rest
    channels = x.shape[1]
    for i, block in enumerate(weights.blocks):
        out_channels, reads = _channels(block)
        if reads != channels or len(block.groups) != plan.groups:
            raise ValueError(
                f"{_OP}: block {i} must read {channels} channels in {plan.groups} groups, as x or the block before"
                f" gives and the plan has, got {reads} in {len(block.groups)}"
            )
        channels = out_channels


def _run(x: Tensor, plan: RoutingPlan, weights: TrunkWeights) -> Tensor:  # as `dynamic_trunk`, x [B, C, H, W]
    B, _, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    maps = [x.new_empty(B, h, w, c).permute(0, 3, 1, 2) for c, h, w in weights.shapes(H, W)]
    last = maps[-1] if maps else x
    features = None if weights.scale is None else x.new_empty(B, last.shape[1])
    weights.handle(x, plan.levels.t(), maps, features)
    return last if features is None else features


def _block_by_block(x: Tensor, plan: RoutingPlan, weights: TrunkWeights) -> Tensor:  # as `dynamic_trunk`, [B, C, H, W]
    for (block, conv), route in zip(weights._with_shortcuts(), plan, strict=True):
        if conv is not None:
            op: Any = dynamic_residual if isinstance(block, ResidualWeights) else dynamic_bottleneck
            x = op(x, route, block, conv(x))
        elif isinstance(block, ResidualWeights):
            x = dynamic_residual_(x, route, block)
        else:
            x = dynamic_bottleneck_(x, route, block)
    if weights.scale is None or weights.shift is None:
        return x
    scaled = x.float() * weights.scale[:, None, None] + weights.shift[:, None, None]
    return scaled.relu().mean((2, 3)).to(x.dtype)
