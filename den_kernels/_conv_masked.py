"""Dynamic convolution as its equation: the whole convolution, masked on both sides, in PyTorch operations.

It runs on devices that have no kernels of ours (other than CPUs), inside torch.func, and where gradients have
gradients: all of it can be differentiated and batched again. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._conv_cpu import convolution_backward
from ._geometry import Geometry, compute_dtype, memory_format_of
from .plan import Route, channels_of


def _selected_channels(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    route: Route,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:  # bool [B, C_in], bool [B, C_out]
    selection = route.selection()
    reads = channels_of(selection, geometry.in_sizes, x.shape[1])
    return reads, channels_of(selection, geometry.out_sizes, weight.shape[0])


def _read(
    x: Tensor,  # [B, C_in, H, W]
    reads: Tensor,  # bool [B, C_in]
    geometry: Geometry,
) -> Tensor:  # [B, C_in, H, W]
    """x with zeros in the channels that are not read."""
    x = torch.where(reads[:, :, None, None], x, 0)
    alone = isinstance(x.shape[0], int) and x.shape[0] == 1  # a batch that is traced is taken for more than one
    return x.contiguous() if alone and geometry.groups > 1 else x  # as in `_segment_backward` of _conv_cpu.py


def equation(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    route: Route,
    geometry: Geometry,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """`where(writes, conv2d(where(reads, x, 0), weight, bias, ...), 0)`: every channel is computed."""
    reads, writes = _selected_channels(x, weight, route, geometry)
    y = torch.convolution(
        _read(x, reads, geometry), weight, bias,
        geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups,
    )  # fmt: skip
    return torch.where(writes[:, :, None, None], y, 0)


def masked_forward(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    route: Route,
    geometry: Geometry,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The equation in the memory format of a convolution."""
    y = equation(x, weight, bias, route, geometry)
    return y.contiguous(memory_format=memory_format_of(x, weight))


def masked_backward(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    route: Route,
    geometry: Geometry,
    output_mask: Sequence[bool],  # [3]: which of the gradients are wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight and bias
    """The gradients of the equation; they have gradients themselves."""
    reads, writes = _selected_channels(x, weight, route, geometry)
    wide = compute_dtype(x)
    made = convolution_backward(
        torch.where(writes[:, :, None, None], grad, 0).to(wide), _read(x, reads, geometry).to(wide), weight.to(wide),
        geometry, output_mask,
    )  # fmt: skip
    dx, dweight, dbias = (m.to(x.dtype) if wanted else None for m, wanted in zip(made, output_mask, strict=True))
    if dx is not None:
        dx = torch.where(reads[:, :, None, None], dx, 0).contiguous(memory_format=memory_format_of(x))
    if dweight is not None:
        dweight = dweight.contiguous(memory_format=memory_format_of(weight))
    return dx, dweight, dbias
