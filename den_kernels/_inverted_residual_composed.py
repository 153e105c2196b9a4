"""The inverted residual block as dynamic convolutions, where no kernel takes it whole."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._geometry import Geometry
from .activations import ACTIVATIONS
from .dynamic_conv import compute
from .inverted_residual_weights import InvertedResidualWeights
from .plan import Route


def branch(
    x: Tensor,  # [B, C, H, W]
    route: Route,
    weights: InvertedResidualWeights,
    convolve: Callable[..., Tensor] = compute,  # takes what `compute` takes
) -> Tensor:  # [B, C_out, H_out, W_out]; 0 of an instance at level 0
    """The branch of the block, over the hidden channels that each instance selected."""
    groups, act = weights.groups, ACTIVATIONS[weights.activation]
    conv = partial(_convolution, convolve)
    h = x
    if weights.conv1 is not None:
        h = act(conv(h, weights.conv1, weights.bias1, route, groups, ()))
    if weights.conv2 is not None:
        h = act(conv(h, weights.conv2, weights.bias2, route, groups, groups, weights.stride, len(weights.conv2)))
    if weights.squeeze is not None and weights.excite is not None:
        means = h.mean((2, 3), keepdim=True)
        squeezed = conv(means, weights.squeeze, weights.squeeze_bias, route, (), groups)
        squeezed = ACTIVATIONS[weights.squeeze_activation](squeezed)
        gates = conv(squeezed, weights.excite, weights.excite_bias, route, groups, ())
        h = h * ACTIVATIONS[weights.gate_activation](gates)
    h = conv(h, weights.conv3, weights.bias3, route, (), groups)
    return torch.where((route.levels > 0)[:, None, None, None], h, 0)


def _convolution(
    convolve: Callable[..., Tensor],
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / cardinality, R, S]
    bias: Tensor | None,  # [C_out]
    route: Route,
    out_sizes: tuple[int, ...],
    in_sizes: tuple[int, ...],
    stride: int = 1,
    cardinality: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The "same" convolution over the channels in use."""
    R, S = weight.shape[2:]
    own = None if bias is None else bias.to(weight.dtype)
    geometry = Geometry((stride, stride), (R // 2, S // 2), (1, 1), cardinality, out_sizes, in_sizes)
    return convolve(x, weight, own, route, geometry)
