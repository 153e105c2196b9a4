"""The residual block elsewhere than on a CPU: one fused kernel, launches in Triton, or PyTorch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda, _triton
from ._block_op import activated, empty_result, own_shortcut
from .plan import Route, channels_of
from .residual_weights import ResidualWeights


def run(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: ResidualWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: x, pooled and widened
    inplace: bool,
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last; x if inplace
    """shortcut + branch(x), of a post-activation block through ReLU.

    Computed by the fused kernel where it has a layout for the block, else in Triton, else in PyTorch operations. With
    the block's own shortcut no ReLU runs over an instance at level 0: x of a post-activation block comes from a ReLU,
    and so its shortcut is not negative.
    """
    layout = _cuda.choose_fused(x, route, weights)
    in_triton = layout is None and _triton.takes(x)
    if layout is None and not in_triton:
        branch, out = masked_branch(x, route, weights), x if inplace else own_shortcut(x, weights, shortcut)
        out.add_(branch)
        return out.relu_() if weights.relu else out
    given = inplace or shortcut is not None
    out = x if inplace else own_shortcut(x, weights, shortcut) if given else empty_result(x, weights)
    if layout is not None:
        _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=given)
    else:
        from ._triton.residual import add_branch

        add_branch(x, out, route, weights, holds_shortcut=given)
    return out.relu_() if weights.relu and shortcut is not None else out  # a given shortcut may hold negative values


def masked_branch(x: Tensor, route: Route, weights: ResidualWeights) -> Tensor:
    """branch(x) [B, C_out, H_out, W_out] of x [B, C, H, W] on any device, without waiting for it.

    All channels are computed, and those that an instance does not use set to zero. Nothing is written over.
    """
    used, (R, S) = channels_of(route.selection(), weights.groups)[:, :, None, None], weights.conv1.shape[2:]
    conv1, bias1, conv2 = weights.all_hidden()
    a = activated(x, weights).to(conv1.dtype)
    h = F.conv2d(a, conv1, bias1, weights.stride, (R // 2, S // 2)).relu()
    bias2 = None if weights.bias2 is None else weights.bias2.to(h.dtype)
    y = F.conv2d(torch.where(used, h, 0), conv2, bias2, 1, (conv2.shape[2] // 2, conv2.shape[3] // 2))
    return torch.where(used.any(1, keepdim=True), y, 0)
