"""The residual blocks of a whole trunk at inference on a CPU, in one call of C++ (csrc/dynamic_trunk.cpp).

Equivalent to the blocks one after the other, each over the hidden channels that an instance selected for it

    for weights in blocks: x = shortcut(x) + branch(x)
    features = relu(x * scale + shift).mean((2, 3))

(Ahn, Kim, Oh, ICCV 2019, section 3.1). Instances do not depend on each other at inference: a chunk of them is one
thread's work through all blocks, with no wait between blocks, so that a thread that loses its core delays nobody. The
result does not depend on how the batch is cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._extension import extension
from ._handle import HasHandle
from .bottleneck import BottleneckWeights, add_bottleneck_
from .dynamic_residual import dynamic_residual_
from .eager import in_range, not_scriptable, refuse_symbols, refuse_training, runs_eagerly
from .plan import RoutingPlan
from .residual_weights import ResidualWeights
from .rows import pool_rows

_OP = "dynamic_trunk"
_NAME = f"den_kernels::{_OP}"


@dataclass(frozen=True)
class TrunkWeights(HasHandle):
    """The folded weights of N blocks in their order, and of the batch norm behind the last one.

    scale, shift: float32 [C] of that norm as an affine map; None: the trunk's result is the last block's map.
    """

    blocks: tuple[ResidualWeights | BottleneckWeights, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object, `extension.Trunk`; ValueError for blocks that do not follow one another."""
        return extension.Trunk([block.handle for block in self.blocks], self.scale, self.shift)

    @cached_property
    def whole(self) -> bool:
        """Whether one call runs all blocks: direct kernels for each of them, all of one dtype."""
        if extension is None or not self.blocks:
            return False
        dtypes = {_dtype(block) for block in self.blocks}
        return len(dtypes) == 1 and None not in dtypes

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """That of the maps; None where no direct kernel runs the first block."""
        return _dtype(self.blocks[0])

    def shapes(self, height: int, width: int) -> Iterator[tuple[int, int, int]]:
        """[C_out, H_out, W_out] of each block that changes the shape of its map."""
        for block in self.blocks:
            C, C_out, stride = _shape(block)
            height, width = -(-height // stride), -(-width // stride)
            if stride > 1 or C_out > C:
                yield C_out, height, width


def _dtype(block: ResidualWeights | BottleneckWeights) -> torch.dtype | None:
    """The dtype of the direct kernel that runs a block; None where another way does."""
    if isinstance(block, BottleneckWeights):
        return block.tensors[2].dtype if block.tensors[2] is not None else None
    return block.conv1.dtype if block.direct is not None and not block.relu else None


def _shape(block: ResidualWeights | BottleneckWeights) -> tuple[int, int, int]:
    """Input channels, output channels and stride."""
    if isinstance(block, BottleneckWeights):
        return block.shape[0], block.shape[2], block.shape[5]
    return block.conv1.shape[1], block.conv2.shape[0], block.stride


@not_scriptable
def dynamic_trunk(
    x: Tensor,  # [B, C, H, W]
    plan: RoutingPlan,  # of N blocks
    weights: TrunkWeights,
) -> Tensor:  # [B, C_out, H_out, W_out], or [B, C_out] with a norm behind the last block
    """Run all blocks of a trunk for inference; may write over `x`.

    One call where `weights.whole` and the plan is one of levels; else block by block, with the same values.

    Raises ValueError for a plan of other blocks, instances or groups, for another device, for `x` that requires a
    gradient, and inside torch.func; TypeError for another dtype.
    """
    refuse_symbols(_OP, x)
    refuse_training(_OP, x=x)
    _check(x, plan, weights)
    if not (weights.whole and x.is_cpu and plan.masks is None and runs_eagerly(x)):
        return _block_by_block(x, plan, weights)
    return in_range(_NAME, _run, x, plan, weights)


def _check(x: Tensor, plan: RoutingPlan, weights: TrunkWeights) -> None:
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
    if weights.dtype is not None and x.dtype != weights.dtype:
        raise TypeError(f"{_OP}: x must be {weights.dtype} as the weights are, got {x.dtype}")


def _run(x: Tensor, plan: RoutingPlan, weights: TrunkWeights) -> Tensor:
    B, _, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    maps = [x.new_empty(B, h, w, c).permute(0, 3, 1, 2) for c, h, w in weights.shapes(H, W)]
    last = maps[-1] if maps else x
    features = None if weights.scale is None else x.new_empty(B, last.shape[1])
    weights.handle(x, plan.levels.t(), maps, features)
    return last if features is None else features


def _block_by_block(x: Tensor, plan: RoutingPlan, weights: TrunkWeights) -> Tensor:
    for block, route in zip(weights.blocks, plan, strict=True):
        if isinstance(block, ResidualWeights):
            x = dynamic_residual_(x, route, block)
        else:
            C, C_out, stride = _shape(block)
            x = x.contiguous(memory_format=torch.channels_last)
            x = add_bottleneck_(x if (C, stride) == (C_out, 1) else pool_rows(x, C_out, stride), x, route, block)
    if weights.scale is None or weights.shift is None:
        return x
    scaled = x.float() * weights.scale[:, None, None] + weights.shift[:, None, None]
    return scaled.relu().mean((2, 3)).to(x.dtype)
