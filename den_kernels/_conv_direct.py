"""Dynamic convolution on a CPU, direct: all instances in one call, with no gather and no scatter.

float32 with AVX-512 or AVX2 (csrc/direct_conv.h), bfloat16 with AMX or AVX-512 BF16 (csrc/dynamic_bf16.h). Weights are
packed for it, once where a layer keeps them; one packing serves all levels and masks.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._extension import extension
from ._geometry import Geometry, is_product, memory_format_of
from .eager import refuse_recording
from .plan import Route


def runs_direct(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, R, S]
    geometry: Geometry,
    packed: bool = False,  # the weight is packed already
    route: Route | None = None,
) -> bool:
    """True where the direct convolution takes these, whatever x and weight hold.

    On a CPU, channels-last, or where the weight is packed already: then it pays to convert the maps. No cardinality, at
    most 49 taps; in bfloat16 also dilation 1 and channels divisible by 16. Fully connected layers of many weights
    (`_faster_as_product`) are left to BLAS, and with a route of levels a batch whose instances are all at the highest
    to oneDNN: it is one ordinary convolution, which that does faster.
    """
    if route is not None and route.mask is None and int(route.offsets[1]) == x.shape[0]:
        return False
    taps = weight.shape[2] * weight.shape[3]
    if extension is None or not x.is_cpu or geometry.groups != 1 or taps > 49:
        return False
    if taps == 1 and is_product(x, weight, geometry) and _faster_as_product(x, weight, packed):
        return False
    if not packed and memory_format_of(x, weight) != torch.channels_last:
        return False
    if x.dtype == torch.bfloat16:
        fits = tuple(geometry.dilation) == (1, 1) and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
        return fits and extension.has_direct_bf16()
    return x.dtype == torch.float32 and extension.has_direct_float32()


def _faster_as_product(x: Tensor, weight: Tensor, packed: bool) -> bool:
    """True where a product of matrices [B, C_in] and [C_in, C_out] is faster by BLAS than direct.

    Direct reads the weights anew for every instance, which costs time where they fit no cache, and has to pack them
    first. The bounds are where the two met on an Intel Xeon with AMX (one thread, float32 and bfloat16).
    """
    weights = weight.numel()
    return x.shape[0] * weights >= 1 << 29 if packed else weights >= 1 << 18


@lru_cache(maxsize=1024)
def _window(kernel: tuple[int, ...], geometry: Geometry) -> Any:
    """The C++ description of a convolution without its tensors, made once."""
    _, _, _, _, out_sizes, in_sizes = geometry
    return extension.Window(kernel, geometry.stride, geometry.padding, geometry.dilation, in_sizes, out_sizes)


def pack_anew(weight: Tensor, in_sizes: Sequence[int], scale: Tensor | None = None, turned: bool = False) -> Tensor:
    """Weights [O, I, R, S], times scale (float32 [O]), in the layout that the direct kernels read.

    float32: [ceil(O / 16), ceil(I / 16), R * S, 16, 16], every prefix of I contiguous. bfloat16: csrc/dynamic_bf16.h,
    for convolutions over the prefixes of I that `in_sizes` add up to (() is all of I).
    turned: the weights that :func:`input_gradient` convolves with, sides swapped and kernel turned; without a scale.
    """
    O, I, R, S = weight.shape
    if turned:
        O, I = I, O
    if weight.dtype == torch.bfloat16:
        packed = weight.new_empty(extension.packed_size_bf16(O, I, R, S, in_sizes))
    else:
        packed = weight.new_empty(-(-O // 16), -(-I // 16), R * S, 16, 16)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if turned:
        extension.pack_turned_weights(weight, packed, in_sizes)
    else:
        extension.pack_weights(weight, scale, packed, in_sizes)
    return packed


def pack(weight: Tensor, in_sizes: Sequence[int], scale: Tensor | None = None) -> Tensor:
    """:func:`pack_anew` for weights [O, I, R, S] that are kept packed; RuntimeError where the call is recorded."""
    refuse_recording("pack")
    return pack_anew(weight, in_sizes, scale)


def forward(
    x: Tensor,  # [B, C_in, H, W]
    packed: Tensor,  # the whole weight [C_out, C_in, R, S], by `pack`
    kernel: tuple[int, ...],  # R, S
    bias: Tensor | None,  # [C_out]
    route: Route,
    shape: Sequence[int],  # of the output
    geometry: Geometry,
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
    """Convolve all instances in one call of C++."""
    B, C_out, H_out, W_out = shape
    x = x.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(B, H_out, W_out, C_out).permute(0, 3, 1, 2)
    selections = route.groups, route.order, route.offsets, route.mask
    extension.dynamic_conv(x, out, selections, _window(kernel, geometry), packed, bias)
    return out


class Packed:
    """A layer's weight [C_out, C_in, R, S], packed, and the call that finds it ready.

    geometry: of the layer; None, as cardinality, leaves it without such a call.

    `run(x, (groups, order, offsets, mask), bias)` gives the layer's result in inference for x [B, C_in, H, W] on a CPU
    and a route, or None where `dynamic_conv2d` has to look at them.
    """

    def __init__(self, weight: Tensor, packed: Tensor, geometry: Geometry | None) -> None:
        self.weight, self.run = packed, None
        if geometry is None or not runs_direct(weight.new_empty(1, weight.shape[1], 2, 2), weight, geometry, True):
            return
        window = _window(weight.shape[2:], geometry)
        self.run = extension.Convolution(window, packed, weight.shape[0], weight.shape[1])


def gradients(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, R, S]
    route: Route,
    geometry: Geometry,
    wanted: Sequence[bool],  # of x, of weight
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, channels-last; None for what is not wanted, or what no direct kernel computes."""
    strided = tuple(geometry.stride) != (1, 1)
    by_amx = strided and x.dtype == torch.bfloat16 and extension is not None and extension.bf16_isa() == "AMX"
    if by_amx or not runs_direct(x, weight, geometry):
        return None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx = dweight = None
    if wanted[0]:
        dx = (strided_input_gradient if strided else input_gradient)(grad, x, weight, route, geometry)
    if wanted[1]:
        x, (C_out, C, R, S) = x.contiguous(memory_format=torch.channels_last), weight.shape
        dweight = weight.new_empty(C_out, R, S, C).permute(0, 3, 1, 2)
        selections = route.groups, route.order, route.offsets, route.mask
        extension.dynamic_conv_weight_gradient(x, grad, dweight, selections, _window((R, S), geometry))
    return dx, dweight


def input_gradient(
    grad: Tensor,  # [B, C_out, H_out, W_out] channels-last
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, R, S]
    route: Route,
    geometry: Geometry,
) -> Tensor | None:  # [B, C_in, H, W] channels-last
    """The gradient of x of a convolution of stride 1; None where the padding is beyond the kernel's reach.

    A direct convolution of grad, in which the channel sides are swapped and the kernel is turned by 180 degrees.
    """
    kernel = weight.shape[2:]
    padding = tuple([d * (k - 1) - p for d, k, p in zip(geometry.dilation, kernel, geometry.padding, strict=True)])
    if min(padding) < 0:
        return None
    turned = Geometry((1, 1), padding, geometry.dilation, 1, geometry.in_sizes, geometry.out_sizes)
    packed = pack_anew(weight, turned.in_sizes, turned=True)
    return forward(grad, packed, kernel, None, route, x.shape, turned)


class Phase(NamedTuple):
    """On one axis, the pixels first, first + stride, ... of dx: the taps that reach them, and the padding before."""

    first: int
    taps: slice
    padding: int


@lru_cache(maxsize=1024)
def phases(size: int, side: int, stride: int, padding: int) -> tuple[Phase, ...] | None:
    """The phases of an axis of dx of `size` pixels, of a kernel of `side` taps; None where one begins inside the map.

    A tap r of output pixel o reads pixel stride * o + r - padding: each pixel is read by every `stride`-th tap, and the
    pixels of a phase by the same ones, so that a convolution of stride 1 gathers what these carry back.

    >>> phases(6, 3, 2, 1)
    (Phase(first=0, taps=slice(1, 3, 2), padding=0), Phase(first=1, taps=slice(0, 3, 2), padding=0))
    """
    found = []
    for first in range(min(stride, size)):
        tap = (first + padding) % stride
        count = len(range(tap, side, stride))
        above = count - 1 - (first + padding - tap) // stride
        if count and above < 0:
            return None
        if count:
            found.append(Phase(first, slice(tap, side, stride), above))
    return tuple(found)


def strided_input_gradient(
    grad: Tensor,  # [B, C_out, H_out, W_out] channels-last
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, R, S]
    route: Route,
    geometry: Geometry,
) -> Tensor | None:  # [B, C_in, H, W] channels-last
    """The gradient of x of a convolution with a stride, phase by phase; None where it is dilated, or no phase fits."""
    if tuple(geometry.dilation) != (1, 1):
        return None
    (B, C, H, W), (R, S) = x.shape, weight.shape[2:]
    rows, columns = (phases(*axis) for axis in zip((H, W), (R, S), geometry.stride, geometry.padding, strict=True))
    if rows is None or columns is None:
        return None
    dx = x.new_empty(B, H, W, C).permute(0, 3, 1, 2)
    if (len(rows), len(columns)) != (min(geometry.stride[0], H), min(geometry.stride[1], W)):
        dx.zero_()  # pixels that no tap reaches
    selections = route.groups, route.order, route.offsets, route.mask
    for row, column in product(rows, columns):
        taps = weight[:, :, row.taps, column.taps]
        turned = Geometry((1, 1), (row.padding, column.padding), (1, 1), 1, geometry.in_sizes, geometry.out_sizes)
        window, packed = _window(taps.shape[2:], turned), pack_anew(taps, turned.in_sizes, turned=True)
        extension.dynamic_conv_phase(
            grad, dx, selections, window, packed, (row.first, column.first), tuple(geometry.stride)
        )
    return dx
