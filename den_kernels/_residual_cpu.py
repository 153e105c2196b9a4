"""The residual block on a CPU: in one direct call of C++, which bottlenecks share, or through oneDNN, by segments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._block_op import keeps_shape, own_shortcut
from .bottleneck_weights import BottleneckWeights
from .inverted_residual_weights import InvertedResidualWeights
from .plan import Route
from .residual_weights import ResidualWeights
from .rows import gather_rows, scatter_rows_, segments

DirectWeights = ResidualWeights | BottleneckWeights | InvertedResidualWeights

# Bytes of a chunk's maps, chosen so that they stay in the cores' private caches between the two convolutions.
_CHUNK_BYTES = 6 << 20


def run_direct(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: DirectWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: x, pooled and widened
    inplace: bool,
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last; the shortcut itself if inplace
    """shortcut + branch(x), and its ReLU, in C++ (csrc/direct_residual.h, direct_bottleneck.h).

    With `inplace` instances at level 0 are not touched, not even by the ReLU.
    """
    if shortcut is None and keeps_shape(x, weights):
        shortcut = x
    elif shortcut is None:
        shortcut, inplace = own_shortcut(x, weights), True
    shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    out = shortcut if inplace else torch.empty_like(shortcut)
    weights.handle(x, shortcut, out, (route.groups, route.order, route.offsets, route.mask))
    return out


def run_onednn(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: ResidualWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: x, pooled and widened
    inplace: bool,
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last; x if inplace
    """shortcut + branch(x) by dense convolutions over the instances of each segment.

    With `inplace` out is x: the rows of a chunk are gathered from x before its sums are added to them.
    """
    out = x if inplace else own_shortcut(x, weights, shortcut)
    compute, P_in, P_out = weights.dtype, x.shape[2] * x.shape[3], out.shape[2] * out.shape[3]
    levels = weights.levels if route.mask is None else ()
    whole = None if levels else weights.all_hidden()
    bias2 = None if weights.bias2 is None else weights.bias2.to(compute)
    for start, end, groups in segments(route):
        if not any(groups):
            continue
        hidden = weights.hidden(groups, whole) if whole else levels[sum(groups) - 1]
        map_bytes = compute.itemsize * (P_in * x.shape[1] + P_out * (hidden.bias1.shape[0] + out.shape[1]))
        step = chunk_size(end - start, map_bytes)
        for i in range(start, end, step):
            rows = route.order[i : min(i + step, end)]
            relu = weights.scale1 is not None
            a = gather_rows(x, rows, x.shape[1], weights.scale1, weights.shift1, relu, compute)
            h = _convolution(a, hidden.conv1, hidden.bias1, weights.stride, True)
            y = _convolution(h, hidden.conv2, bias2, 1, False)
            scatter_rows_(out, y, rows, accumulate=True)
    return out


def _convolution(
    x: Tensor,  # [n, C, H, W]
    weight: Tensor,  # [O, C, R, S] channels-last
    bias: Tensor | None,  # [O]
    stride: int,
    relu: bool,
) -> Tensor:  # [n, O, H_out, W_out] channels-last
    """The "same" convolution, then ReLU if asked: in a pass of its own, as oneDNN's fused ReLU turns NaN into 0."""
    R, S = weight.shape[2:]
    y = F.conv2d(x, weight, bias, stride, (R // 2, S // 2))
    y = y.contiguous(memory_format=torch.channels_last)
    return y.relu_() if relu else y


def chunk_size(instances: int, map_bytes: int) -> int:
    """Instances per chunk: as many as keep the maps in the cache, at least 8 so that a call's cost is spread.

    >>> chunk_size(128, 640 << 10)   # 64 channels, 32 x 32, float32
    9
    """
    return min(instances, max(8, _CHUNK_BYTES // max(map_bytes, 1)))
