"""`dynamic_conv2d` and its gradients on a GPU, from the two kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._geometry import Geometry, memory_format_of
from ..plan import Route, channels_of
from .convolve import Epilogue, convolve
from .weight_gradient import weight_gradient


def _allocate(shape: Sequence[int], like: Tensor, elastic: bool) -> Tensor:
    """Memory of the shape [B, C, H, W], channels-last, on the device of `like`; zeroed if the kernel skips channels."""
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return out.zero_() if elastic else out


def forward(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    route: Route,
    geometry: Geometry,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The selected groups of every instance in one launch; the rest of the output is zero."""
    out = _allocate(geometry.out_shape(x, weight), x, bool(geometry.out_sizes))
    convolve(x, weight, out, route, geometry, epilogue=Epilogue(bias=bias))
    if memory_format_of(x, weight) == torch.channels_last:
        return out
    return out.contiguous().view(-1).view(out.shape)  # with conv2d's strides of axes of length 1, too


def backward(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    route: Route,
    geometry: Geometry,
    output_mask: Sequence[bool],  # [3]: which of the gradients are wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight and bias
    """The gradients of x, weight and bias; None where `output_mask` does not ask for one."""
    dx = dweight = dbias = None
    if output_mask[0]:
        dx = _allocate(x.shape, x, bool(geometry.in_sizes))
        convolve(grad, weight, dx, route, geometry, transposed=True)
        dx = dx.contiguous(memory_format=memory_format_of(x))
    if output_mask[1]:
        dweight = weight_gradient(grad, x, weight, route, geometry)
        dweight = dweight.contiguous(memory_format=memory_format_of(weight))
    if output_mask[2]:
        writes = channels_of(route.selection(), geometry.out_sizes, weight.shape[0])
        dbias = torch.where(writes, grad.sum((2, 3), dtype=torch.float32), 0).sum(0).to(weight.dtype)
    return dx, dweight, dbias
