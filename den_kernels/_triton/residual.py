"""Residual blocks on a GPU as launches of the convolution kernel, one for each convolution.

The first convolution reads the activated stream, relu(bn1(x)) where the block has these; each writes the selected
hidden channels through the next norm and ReLU; the last reads those and adds to the stream, with a ReLU behind where
the block has one. None touches an instance at level 0, and no hidden channel is cleared.

The activated stream comes from the block before, whose last convolution writes what the next block reads as well, or
from a pass over the instances above level 0. It is never made between a load and a product (conv_kernel.py says why).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._block_op import own_shortcut
from .._geometry import Geometry
from ..bottleneck_weights import BottleneckWeights
from ..plan import Route
from ..residual_weights import ResidualWeights
from .boxes import tile_by_rule
from .convolve import Epilogue, Following, Pooled, convolve
from .launch import architecture
from .norm import activate


class Next(NamedTuple):
    """The block that reads the result: its bn1 as an affine map, and its levels."""

    scale: Tensor  # float32 [C_out]
    shift: Tensor  # float32 [C_out]
    levels: Tensor  # int32 [B]

    @classmethod
    def of(cls, weights: ResidualWeights | BottleneckWeights, route: Route) -> "Next | None":
        """The activation of a block's weights and route; None where a block without bn1 reads the result itself."""
        if weights.scale1 is None or weights.shift1 is None:
            return None
        return cls(weights.scale1, weights.shift1, route.levels)


def hands_on(route: Route, weights: ResidualWeights | BottleneckWeights) -> bool:
    """True where a block's last convolution has registers left to write what the next block reads, beside its own map.

    With masks it has none at 256 channels and more (Triton 3.6, sm_90).
    """
    return route.mask is None or weights.out_channels < 256


class _Layer(NamedTuple):
    """A convolution of the branch, and the affine map behind it."""

    weight: Tensor  # [out, in / groups, R, S]
    bias: Tensor | None  # float32 [out]
    scale: Tensor | None  # float32 [out]
    geometry: Geometry


def _layers(weights: ResidualWeights | BottleneckWeights) -> tuple[_Layer, ...]:
    if isinstance(weights, BottleneckWeights):
        biases = weights.bias1, weights.bias2, None
        return tuple(
            _Layer(weight, bias, None, geometry)
            for (weight, _, geometry), bias in zip(weights.convolutions, biases, strict=True)
        )
    (R, S), (R2, S2) = weights.conv1.shape[2:], weights.conv2.shape[2:]
    first = Geometry((weights.stride,) * 2, (R // 2, S // 2), (1, 1), 1, weights.groups, ())
    second = Geometry((1, 1), (R2 // 2, S2 // 2), (1, 1), 1, (), weights.groups)
    return (
        _Layer(weights.conv1, weights.bias1, weights.scale2, first),
        _Layer(weights.conv2, weights.bias2, None, second),
    )


def _pools(out: Tensor, route: Route, last: _Layer) -> bool:  # [B, C_out, H_out, W_out]
    """True where the last convolution may pool a shortcut itself: on boxes; elsewhere it has no registers left."""
    arch, _ = architecture(out.device)
    wide = out.dtype.itemsize == 2 and arch >= 90 and route.mask is None
    n, k = last.weight.shape[:2]
    return wide and tile_by_rule(n, k, (out.shape[2], out.shape[3])) is not None


def add_branch(
    x: Tensor,  # [B, C, H, W] channels-last
    out: Tensor,  # [B, C_out, H_out, W_out] channels-last; may be x
    route: Route,
    weights: ResidualWeights | BottleneckWeights,
    activated: Tensor | None = None,  # as x: what the block before returned
    following: Next | None = None,
    *,
    holds_shortcut: bool = True,
) -> Tensor | None:
    """out += branch(x) for every instance that selected a group; of a post-activation block then through ReLU.

    Where `out` does not hold the shortcut, it gets that too, x pooled and widened, of every instance.

    Returns relu(out * scale + shift) of `following`, as out, of the instances above level 0 there (the rest is not
    written); None where that is not given.
    """
    here = Next.of(weights, route)
    if here is None:
        activated = x
    elif activated is None:
        activated = activate(x, here.levels, here.scale, here.shift)
    *inner, last = _layers(weights)
    for layer in inner:
        shape = layer.geometry.out_shape(activated, layer.weight)
        hidden = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        epilogue = Epilogue(layer.bias, layer.scale, relu=True)
        convolve(activated, layer.weight, hidden, route, layer.geometry, epilogue=epilogue)
        activated = hidden
    pooled = None
    if not holds_shortcut and not _pools(out, route, last):
        out.copy_(own_shortcut(x, weights))
        holds_shortcut = True
    elif not holds_shortcut:
        pooled = Pooled(x, weights.stride)
    after = None if following is None else Following(torch.empty_like(out), *following)
    fused = after if out.dtype != torch.float32 else None  # float32 leaves no registers for a second output
    relu = isinstance(weights, ResidualWeights) and weights.relu
    convolve(
        activated, last.weight, out, route, last.geometry, skip_empty=True,
        epilogue=Epilogue(
            last.bias, last.scale, holds_shortcut, pooled, relu, fused
        ),
    )  # fmt: skip
    if after is None or fused is not None:
        return after and after.map
    return activate(out, after.levels, after.scale, after.shift)
