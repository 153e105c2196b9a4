"""Dynamic convolution on other devices than the CPU: the whole convolution, masked on both sides; no waiting."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._conv_cpu import Geometry, memory_format_of
from .plan import channels_of


def _selected_channels(
    x: Tensor, weight: Tensor, levels: Tensor, mask: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:  # bool [B, C_in], bool [B, C_out]
    G = len(geometry.out_sizes) or len(geometry.in_sizes)
    selection = levels[:, None] > torch.arange(G, device=levels.device) if mask is None else mask
    reads = channels_of(selection, geometry.in_sizes, x.shape[1])
    return reads, channels_of(selection, geometry.out_sizes, weight.shape[0])


def masked_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Tensor, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """`where(writes, conv2d(where(reads, x, 0), weight, bias, ...), 0)`: every channel is computed."""
    reads, writes = _selected_channels(x, weight, levels, mask, geometry)
    y = torch.convolution(
        torch.where(reads[:, :, None, None], x, 0), weight, bias,
        geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups,
    )  # fmt: skip
    return torch.where(writes[:, :, None, None], y, 0).contiguous(memory_format=memory_format_of(x, weight))


def masked_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `masked_forward`."""
    reads, writes = _selected_channels(x, weight, levels, mask, geometry)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        torch.where(writes[:, :, None, None], grad, 0), torch.where(reads[:, :, None, None], x, 0), weight,
        [weight.shape[0]], geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups,
        output_mask,
    )  # fmt: skip
    if output_mask[0]:
        dx = torch.where(reads[:, :, None, None], dx, 0).contiguous(memory_format=memory_format_of(x))
    if output_mask[1]:
        dweight = dweight.contiguous(memory_format=memory_format_of(weight))
    return dx, dweight, dbias
