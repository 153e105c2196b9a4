"""The bottleneck block as three dynamic convolutions, where no kernel takes it whole."""

from functools import partial

import torch
from torch import Tensor

from . import _triton
from ._block_op import activated, empty_result, own_shortcut
from .bottleneck_weights import BottleneckWeights
from .dynamic_conv import compute
from .plan import Route, RoutingPlan
from .rows import gather_rows, scatter_rows_


def run(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: BottleneckWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: x, pooled and widened
    inplace: bool,
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last; x if inplace
    """shortcut + branch(x). Only the instances above level 0 are read and added to, on a CPU and in Triton."""
    if weights.bias3 is None and _triton.takes(x):
        from ._triton.residual import add_branch

        given = inplace or shortcut is not None
        out = x if inplace else own_shortcut(x, weights, shortcut) if given else empty_result(x, weights)
        add_branch(x, out, route, weights, holds_shortcut=given)
        return out
    out = x if inplace else own_shortcut(x, weights, shortcut)
    if not x.is_cpu:
        branch = _branch(activated(x, weights), route, weights)
        if weights.bias3 is not None:  # which conv3 gives to instances at level 0, too
            branch = torch.where((route.levels > 0)[:, None, None, None], branch, 0)
        return out.add_(branch)
    rows, users = _users(route)
    if len(rows):
        relu = weights.scale1 is not None
        taken = gather_rows(x, rows, x.shape[1], weights.scale1, weights.shift1, relu)
        branch = _branch(taken, users, weights).contiguous(memory_format=torch.channels_last)
        scatter_rows_(out, branch, rows, accumulate=True)
    return out


def _branch(
    x: Tensor,  # [B, C, H, W] activated
    route: Route,
    weights: BottleneckWeights,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The three convolutions, with ReLU behind the first two; the batch norms are in their weights."""
    for index, (weight, bias, geometry) in enumerate(weights.convolutions):
        x = compute(x, weight, bias, route, geometry, partial(weights.packed_alone, index))
        x = x.relu_() if index < 2 else x
    return x


def _users(route: Route) -> tuple[Tensor, Route]:
    """The instances above level 0, int32 [n], and their route as a batch of their own. Reads a CPU route's counts."""
    rows = route.order[: int((route.levels > 0).sum())].contiguous()
    if route.mask is None:
        return rows, RoutingPlan.from_levels(route.levels[rows.long()][:, None], route.groups)[0]
    return rows, RoutingPlan.from_masks(route.mask[rows.long()][:, None])[0]
