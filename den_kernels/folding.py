"""Batch norm with running statistics, as an affine map and folded into the convolution before it."""

import torch
from torch import Tensor, nn


def norm_affine(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, dtype: torch.dtype, name: str = "norm_affine: norm"
) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a batch norm in eval mode: `norm(x) = x * scale + shift`, channel by channel.

    Of `dtype`, but at least float32, whatever the dtypes of its own tensors. Raises ValueError, which says `name`,
    without running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name} must track running statistics, got {norm}")
    wanted = torch.promote_types(dtype, torch.float32)
    wide = torch.promote_types(norm.running_var.dtype, wanted)
    scale = (norm.running_var.detach().to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(wide)
    shift = -norm.running_mean.detach().to(wide) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().to(wide)
    return scale.to(wanted), shift.to(wanted)


def scaled_weight(
    weight: Tensor,  # [O, I, R, S]
    scale: Tensor,  # [O]
) -> Tensor:  # [O, I, R, S] channels-last, in the weight's dtype
    """`weight * scale`, output by output, rounded once."""
    scaled = weight.detach().to(scale.dtype) * scale[:, None, None, None]
    return scaled.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def shifted_bias(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:  # all [O]
    """`bias * scale + shift`, in the dtype of these: a convolution's bias behind the affine map; None is 0."""
    return shift if bias is None else bias.detach().to(shift.dtype) * scale + shift


def fold_norm(
    weight: Tensor,  # [O, I, R, S]
    bias: Tensor | None,  # [O]
    norm: nn.BatchNorm2d,
    name: str = "fold_norm: norm",
) -> tuple[Tensor, Tensor]:  # [O, I, R, S] channels-last in the weight's dtype, [O] of at least float32
    """Weight and bias of the convolution that does what this one and the batch norm after it do in eval mode.

    Raises ValueError, which says `name`, for a norm without running statistics.
    """
    scale, shift = norm_affine(norm, weight.dtype, name)
    return scaled_weight(weight, scale), shifted_bias(bias, scale, shift)
