"""The residual block on a GPU as launches of the convolution kernel.

The first convolution reads the activated stream, relu(bn1(x)) where the block has these, and writes the selected hidden
channels through the next norm and ReLU; the second reads those and adds to the stream, with a ReLU behind where the
block has one. None touches an instance at level 0, and no hidden channel is cleared.

The activated stream comes from the block before, whose second convolution writes what the next block reads as well, or
from a pass over the instances above level 0. It is never made between a load and a product (conv_kernel.py says why).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._geometry import Geometry
from ..plan import Route
from ..residual_weights import ResidualWeights
from .convolve import Epilogue, Following, convolve
from .norm import activate


class Next(NamedTuple):
    """The block that reads the result: its weights, with bn1, and its route."""

    weights: ResidualWeights
    route: Route


def add_branch(
    x: Tensor,  # [B, C, H, W] channels-last
    out: Tensor,  # [B, C_out, H_out, W_out] channels-last; may be x
    route: Route,
    weights: ResidualWeights,
    activated: Tensor | None = None,  # as x: what the block before returned
    following: Next | None = None,
) -> Tensor | None:
    """out += branch(x) for every instance that selected a group; of a post-activation block then through ReLU.

    Returns relu(bn1(out)) of `following`, as out, of the instances above level 0 there (the rest is not written); None
    where that is not given or has no bn1.
    """
    R, S = weights.conv1.shape[2:]
    first = Geometry((weights.stride,) * 2, (R // 2, S // 2), (1, 1), 1, weights.groups, ())
    second = Geometry((1, 1), tuple(side // 2 for side in weights.conv2.shape[2:]), (1, 1), 1, (), weights.groups)
    if weights.scale1 is None or weights.shift1 is None:
        activated = x
    elif activated is None:
        activated = activate(x, route.levels, weights.scale1, weights.shift1)
    shape = first.out_shape(x, weights.conv1)
    hidden = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    convolve(
        activated, weights.conv1, hidden, route, first, epilogue=Epilogue(weights.bias1, weights.scale2, relu=True)
    )
    after = None if following is None else _after(out, following)
    fused = after if out.dtype != torch.float32 else None  # its elements leave no registers for a second output
    convolve(
        hidden, weights.conv2, out, route, second, skip_empty=True,
        epilogue=Epilogue(weights.bias2, add=True, relu=weights.relu, following=fused),
    )  # fmt: skip
    if after is None or fused is not None:
        return after and after.map
    return activate(out, after.levels, after.scale, after.shift)


def _after(out: Tensor, following: Next) -> Following | None:
    scale, shift = following.weights.scale1, following.weights.shift1
    if scale is None or shift is None:
        return None
    return Following(torch.empty_like(out), scale, shift, following.route.levels)
