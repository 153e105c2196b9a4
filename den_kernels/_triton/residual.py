"""The residual block on a GPU as launches of the convolution kernel.

The first convolution reads the activated stream, relu(bn1(x)) where the block has these, which a pass over the instances
above level 0 wrote, and writes the selected hidden channels through the next norm and ReLU; the second reads those and
adds to the stream, with a ReLU behind where the block has one. None of them touches an instance at level 0, and no
hidden channel is cleared.
"""

import torch
from torch import Tensor

from .._conv_cpu import Geometry
from ..plan import Route
from ..residual_weights import ResidualWeights
from .convolve import Epilogue, convolve
from .norm import activate


def add_branch(
    x: Tensor,  # [B, C, H, W] channels-last
    out: Tensor,  # [B, C_out, H_out, W_out] channels-last; may be x
    route: Route,
    weights: ResidualWeights,
) -> None:
    """out += branch(x) for every instance that selected a group; of a post-activation block then through ReLU."""
    R, S = weights.conv1.shape[2:]
    first = Geometry((weights.stride,) * 2, (R // 2, S // 2), (1, 1), 1, weights.groups, ())
    second = Geometry((1, 1), tuple(side // 2 for side in weights.conv2.shape[2:]), (1, 1), 1, (), weights.groups)
    activated = x
    if weights.scale1 is not None and weights.shift1 is not None:
        activated = activate(x, route.levels, weights.scale1, weights.shift1)
    shape = first.out_shape(x, weights.conv1)
    hidden = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    convolve(
        activated, weights.conv1, hidden, route, first, epilogue=Epilogue(weights.bias1, weights.scale2, relu=True)
    )
    convolve(
        hidden, weights.conv2, out, route, second, skip_empty=True,
        epilogue=Epilogue(weights.bias2, add=True, relu=weights.relu),
    )  # fmt: skip
