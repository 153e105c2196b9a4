"""What decides whether a module may run on folded weights, what those depend on, and the folding itself."""

import torch
from torch import Tensor, nn

from den_kernels import DynamicConv2d
from den_kernels.eager import is_ordinary


def may_fold(module: nn.Module) -> bool:
    """Whether ``module`` may run on folded weights: in eval mode, without gradients, not traced or transformed."""
    return not (module.training or torch.is_grad_enabled()) and is_ordinary()


def norm_tensors(norm: nn.BatchNorm1d | nn.BatchNorm2d | None) -> tuple[Tensor, ...]:
    """The tensors of a batch norm that its eval mode depends on."""
    return () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a batch norm in eval mode, in ``dtype`` but at least float32."""
    precise = torch.promote_types(dtype, torch.float32)
    gamma, beta, mean, var = (tensor.detach().to(precise) for tensor in norm_tensors(norm))
    scale = gamma * torch.rsqrt(var + norm.eps)
    return scale, beta - mean * scale


def folded_weight(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [out, in, R, S], channels-last, and bias [out] of ``norm(conv(x))`` in eval mode; ``conv`` has no bias."""
    dtype = conv.weight.dtype
    scale, shift = norm_affine(norm, dtype)
    weight = conv.weight.detach().to(scale.dtype) * scale[:, None, None, None]
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), shift.to(dtype)


def folded_conv(conv: DynamicConv2d, norm: nn.BatchNorm2d) -> DynamicConv2d:
    """``norm(conv(x, route), route)`` in eval mode as one dynamic convolution of the same channel groups.

    A channel that an instance does not use stays exactly 0: it gets no bias either.
    """
    folded = DynamicConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        device="meta", out_groups=conv.out_groups or None, in_groups=conv.in_groups or None,
    )  # fmt: skip
    weight, bias = folded_weight(conv, norm)
    folded.weight, folded.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return folded.eval()
