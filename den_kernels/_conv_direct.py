"""Dynamic convolution on a CPU, direct: all instances in one call, with no gather and no scatter.

float32 with AVX-512 (csrc/dynamic_conv.cpp), bfloat16 with AMX or AVX-512 BF16 (csrc/dynamic_bf16.h). Weights are
packed for it, once where a layer keeps them; one packing serves all levels and masks.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ._conv_cpu import Geometry, memory_format_of
from ._extension import extension
from .plan import Route


def runs_direct(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the direct convolution takes the call: a function of what the tensors are, not of what they hold.

    Channels-last, no cardinality, at most 49 taps; in bfloat16 also dilation 1 and channels divisible by 16.
    """
    if extension is None or geometry.groups != 1:
        return False
    if memory_format_of(x, weight) != torch.channels_last or weight.shape[2] * weight.shape[3] > 49:
        return False
    if x.dtype == torch.bfloat16:
        fits = tuple(geometry.dilation) == (1, 1) and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
        return fits and extension.has_dynamic_residual_bf16()
    return x.dtype == torch.float32 and extension.has_dynamic_residual()


def selections(route: Route) -> tuple[int, int, int, int, int]:
    """A route as the direct kernels take it (csrc/direct_channels.h); it holds addresses of the route's tensors."""
    order, offsets, mask = route.order, route.offsets, route.mask
    assert mask is None or mask.is_contiguous()
    address = 0 if mask is None else mask.data_ptr()
    return offsets.shape[0] - 1, route.groups, order.data_ptr(), offsets.data_ptr(), address


def pack(weight: Tensor, in_sizes: Sequence[int], scale: Tensor | None = None) -> Tensor:
    """[O, I, R, S], times scale (float32 [O]), as the direct kernels read it.

    float32: [ceil(O / 16), ceil(I / 16), R * S, 16, 16], every prefix of I contiguous. bfloat16: csrc/dynamic_bf16.h,
    for convolutions over the prefixes of I that `in_sizes` add up to (() is all of I).
    """
    O, I, R, S = weight.shape
    rows, address = weight.contiguous(memory_format=torch.channels_last), 0 if scale is None else scale.data_ptr()
    if weight.dtype == torch.bfloat16:
        widths = [0, *accumulate(in_sizes or (I,))]
        packed = weight.new_empty(extension.packed_size_bf16(O, R, S, widths))
        extension.pack_weights_bf16(rows.data_ptr(), address, packed.data_ptr(), O, R, S, widths)
    else:
        packed = weight.new_empty(-(-O // 16), -(-I // 16), R * S, 16, 16)
        extension.pack_weights(rows.data_ptr(), address, packed.data_ptr(), O, R * S, I)
    return packed


def pack_turned(weight: Tensor, in_sizes: Sequence[int]) -> Tensor:
    """:func:`pack` of the weights [I, O, R, S] of :func:`transposed`: sides swapped, kernel turned."""
    O, I, R, S = weight.shape
    rows = weight.contiguous(memory_format=torch.channels_last)
    if weight.dtype == torch.bfloat16:
        turned = weight.new_empty(I, R, S, O)
        extension.turn_weights_bf16(rows.data_ptr(), turned.data_ptr(), O, R * S, I)
        return pack(turned.permute(0, 3, 1, 2), in_sizes)
    packed = weight.new_empty(-(-I // 16), -(-O // 16), R * S, 16, 16)
    extension.pack_turned_weights(rows.data_ptr(), packed.data_ptr(), O, R * S, I)
    return packed


def forward(
    x: Tensor,
    packed: Tensor,
    kernel: Sequence[int],
    bias: Tensor | None,
    route: Route,
    shape: Sequence[int],
    geometry: Geometry,
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
    """All instances in one call; `packed` is of the whole weight, `shape` the output's."""
    B, C, H, W = x.shape
    _, C_out, H_out, W_out = shape
    x = x.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(B, H_out, W_out, C_out)
    run = extension.dynamic_conv_bf16 if x.dtype == torch.bfloat16 else extension.dynamic_conv
    run(
        x.data_ptr(), out.data_ptr(), selections(route), (B, H, W, C), (B, H_out, W_out, C_out), kernel,
        geometry.stride, geometry.padding, geometry.dilation, geometry.in_sizes, geometry.out_sizes,
        packed.data_ptr(), 0 if bias is None else bias.data_ptr(),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, route: Route, geometry: Geometry) -> Tensor | None:
    """The gradient of weight, channels-last, all instances in one call; None where no direct convolution runs."""
    if not runs_direct(x, weight, geometry):
        return None
    half = x.dtype == torch.bfloat16
    if half and (extension.bf16_isa() != "AMX" or tuple(geometry.stride) != (1, 1)):
        return None
    B, C, H, W = x.shape
    C_out, (R, S) = weight.shape[0], weight.shape[2:]
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    dweight = weight.new_empty(C_out, R, S, C)
    run = extension.dynamic_conv_weight_gradient_bf16 if half else extension.dynamic_conv_weight_gradient
    run(
        x.data_ptr(), grad.data_ptr(), dweight.data_ptr(), selections(route), (B, H, W, C),
        (B, *grad.shape[2:], C_out), (R, S), geometry.stride, geometry.padding, geometry.dilation,
        geometry.in_sizes, geometry.out_sizes,
    )  # fmt: skip
    return dweight.permute(0, 3, 1, 2)


def transposed(x: Tensor, weight: Tensor, geometry: Geometry) -> Geometry | None:
    """The direct convolution that makes dx out of the gradient: sides swapped, kernel turned; None where none does."""
    padding = [d * (k - 1) - p for d, k, p in zip(geometry.dilation, weight.shape[2:], geometry.padding, strict=True)]
    if tuple(geometry.stride) != (1, 1) or min(padding) < 0 or not runs_direct(x, weight, geometry):
        return None
    return Geometry((1, 1), padding, geometry.dilation, 1, geometry.in_sizes, geometry.out_sizes)
