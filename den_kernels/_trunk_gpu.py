"""The residual blocks of a trunk on a GPU: each hands the next one the activated map that this reads.

A block that one fused kernel takes reads x itself and activates it on the way. One of several launches reads
relu(bn1(x)), which the last launch of the block before writes beside x, so that no pass does: a block of two
convolutions is then two launches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cuda
from ._block_op import empty_result, keeps_shape
from ._cuda_layout import FusedLayout
from .bottleneck_weights import BottleneckWeights
from .plan import Route
from .residual_weights import ResidualWeights

Block = ResidualWeights | BottleneckWeights


def run(
    x: Tensor,  # [B, C, H, W], written over
    routes: Sequence[Route],
    blocks: Sequence[Block],
    scale: Tensor | None,  # float32 [C_out], as an affine map the batch norm behind the last block
    shift: Tensor | None,  # float32 [C_out]
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last; with a norm [B, C_out]: means of its ReLU
    """All blocks, one after the other, where Triton runs."""
    from ._triton.norm import pool
    from ._triton.residual import Next, add_branch, hands_on

    x = x.contiguous(memory_format=torch.channels_last)
    layout = _fused_layout(x, routes[0], blocks[0])
    activated = None
    for i, (block, route) in enumerate(zip(blocks, routes, strict=True)):
        out = x if keeps_shape(x, block) else empty_result(x, block)
        behind = None if i + 1 == len(blocks) else (blocks[i + 1], routes[i + 1])
        next_layout = None if behind is None else _fused_layout(out, behind[1], behind[0])
        if layout is not None and isinstance(block, ResidualWeights):
            _cuda.fused_residual(x, out, route, block, layout, holds_shortcut=out is x)
            activated = None
        else:
            asked = behind is not None and next_layout is None and hands_on(route, block)
            following = Next.of(*behind) if behind is not None and asked else None
            activated = add_branch(x, out, route, block, activated, following, holds_shortcut=out is x)
        x, layout = out, next_layout
    return x if scale is None or shift is None else pool(x, scale, shift)


def _fused_layout(x: Tensor, route: Route, block: Block) -> FusedLayout | None:  # x [B, C, H, W]
    """The layout in which the fused kernel runs the block, None where it does not."""
    return _cuda.choose_fused(x, route, block) if isinstance(block, ResidualWeights) else None
