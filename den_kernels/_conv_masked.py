"""Dynamic convolution as its equation: the whole convolution, masked on both sides, in PyTorch operations.

What runs on other devices than the CPU that have no kernels, inside torch.func, and where gradients have gradients:
all of it can be differentiated and batched again. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._geometry import Geometry, compute_dtype, memory_format_of
from .plan import channels_of


def _selected_channels(
    x: Tensor, weight: Tensor, levels: Tensor, mask: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:  # bool [B, C_in], bool [B, C_out]
    G = len(geometry.out_sizes) or len(geometry.in_sizes)
    selection = levels[:, None] > torch.arange(G, device=levels.device) if mask is None else mask
    reads = channels_of(selection, geometry.in_sizes, x.shape[1])
    return reads, channels_of(selection, geometry.out_sizes, weight.shape[0])


def equation(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Tensor, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """`where(writes, conv2d(where(reads, x, 0), weight, bias, ...), 0)`: every channel is computed."""
    reads, writes = _selected_channels(x, weight, levels, mask, geometry)
    y = torch.convolution(
        torch.where(reads[:, :, None, None], x, 0), weight, bias,
        geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups,
    )  # fmt: skip
    return torch.where(writes[:, :, None, None], y, 0)


def masked_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Tensor, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """The equation in the memory format of a convolution."""
    y = equation(x, weight, bias, levels, mask, geometry)
    return y.contiguous(memory_format=memory_format_of(x, weight))


def masked_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the equation; they have gradients themselves."""
    reads, writes = _selected_channels(x, weight, levels, mask, geometry)
    wide = compute_dtype(x)
    made = torch.ops.aten.convolution_backward(
        torch.where(writes[:, :, None, None], grad, 0).to(wide), torch.where(reads[:, :, None, None], x, 0).to(wide),
        weight.to(wide), [weight.shape[0]],
        geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups, output_mask,
    )  # fmt: skip
    dx, dweight, dbias = (m.to(x.dtype) if wanted else None for m, wanted in zip(made, output_mask, strict=True))
    if dx is not None:
        dx = torch.where(reads[:, :, None, None], dx, 0).contiguous(memory_format=memory_format_of(x))
    if dweight is not None:
        dweight = dweight.contiguous(memory_format=memory_format_of(weight))
    return dx, dweight, dbias
