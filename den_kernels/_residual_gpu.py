"""The residual block elsewhere than on a CPU: one fused kernel, launches in Triton, or PyTorch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda, _triton
from ._block_op import empty_result, own_shortcut
from .plan import Route
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
    in_triton = layout is None and x.dtype in _triton.DTYPES and _triton.runs_on(x.device)
    if layout is None and not in_triton:
        out = x if inplace else own_shortcut(x, weights, shortcut)
        add_branch_masked(x, out, route, weights)
        return out.relu_() if weights.relu else out
    given = inplace or shortcut is not None
    out = x if inplace else own_shortcut(x, weights, shortcut) if given else empty_result(x, weights)
    if layout is not None:
        _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=given)
    else:
        from ._triton.residual import add_branch

        add_branch(x, out, route, weights, holds_shortcut=given)
    return out.relu_() if weights.relu and shortcut is not None else out  # a given shortcut may hold negative values


def add_branch_masked(
    x: Tensor,  # [B, C, H, W]
    out: Tensor,  # [B, C_out, H_out, W_out], added to
    route: Route,
    weights: ResidualWeights,
) -> None:
    """Add branch(x) on any device, without waiting for it: all channels are computed, the others set to zero."""
    R, S = weights.conv1.shape[2:]
    selection = route.selection()
    channels = selection[:, weights.group_of_channel][:, :, None, None]
    used = selection.any(1)[:, None, None, None]
    a = x
    if weights.scale1 is not None and weights.shift1 is not None:
        a = (x * weights.scale1[:, None, None] + weights.shift1[:, None, None]).relu_().to(x.dtype)
    conv1, bias1, conv2 = weights.all_hidden()
    h = F.conv2d(a, conv1, bias1, weights.stride, (R // 2, S // 2))
    h = torch.where(channels, h.relu_(), 0)
    bias2 = None if weights.bias2 is None else weights.bias2.to(h.dtype)
    y = F.conv2d(h, conv2, bias2, 1, (conv2.shape[2] // 2, conv2.shape[3] // 2))
    out.add_(torch.where(used, y, 0))
