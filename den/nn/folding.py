"""Folding of batch norms into convolutions for inference: what it depends on, and the folding."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from den_kernels import DynamicConv2d
from den_kernels.building import fold_norm


def norm_tensors(norm: nn.BatchNorm1d | nn.BatchNorm2d | None) -> tuple[Tensor, ...]:
    """The tensors of a batch norm that its eval mode depends on."""
    if norm is None:
        return ()
    return norm.weight, norm.bias, cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


def folded_weight(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [out, in, R, S], channels-last, and bias [out] of `norm(conv(x))` in eval mode, both in its dtype."""
    weight, bias = fold_norm(conv.weight, conv.bias, norm)
    return weight, bias.to(weight.dtype)


@torch.inference_mode(False)  # an inference tensor has no version, by which a convolution keeps its packed weight
def folded_conv(conv: DynamicConv2d, norm: nn.BatchNorm2d) -> DynamicConv2d:
    """`norm(conv(x, route), route)` in eval mode as one dynamic convolution of the same channel groups.

    A channel that an instance does not use stays exactly 0: it gets no bias either.
    """
    kernel, stride, padding, dilation = cast(
        Sequence[tuple[int, int]], (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    )
    folded = DynamicConv2d(
        conv.in_channels, conv.out_channels, kernel, stride, padding, dilation, conv.groups,
        device="meta", out_groups=conv.out_groups or None, in_groups=conv.in_groups or None,
    )  # fmt: skip
    weight, bias = folded_weight(conv, norm)
    folded.weight, folded.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return folded.eval()
