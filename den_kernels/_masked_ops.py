"""The ops in operations of PyTorch, for whole batches: what `masked` writes into exported programs.

Every channel is computed, and what an instance does not use is set to 0. Nothing is written over, and no value decides
what is computed, so that all of it can be traced. The functions take what the registered ops take.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _inverted_residual_composed
from ._block_op import activated, own_shortcut
from ._conv_masked import masked_forward
from ._geometry import Geometry
from ._norm_torch import norm_torch
from ._operands import Operands
from ._residual_gpu import masked_branch
from .bottleneck_weights import BottleneckWeights
from .dynamic_bottleneck import OPERANDS as BOTTLENECK
from .dynamic_conv import route_of
from .dynamic_graph import graph_of, run_masked
from .dynamic_inverted_residual import OPERANDS as INVERTED_RESIDUAL
from .dynamic_residual import OPERANDS as RESIDUAL
from .plan import Route, RoutingPlan, channels_of
from .residual_weights import ResidualWeights, is_stand_in

_OP = "masked"


def plan_levels(levels: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:  # [B, N]
    """`plan_levels`, of levels that are clamped to 0..groups."""
    levels = levels.t().long().clamp(0, groups)
    order = _ranks(groups - levels, _places(levels)).argsort(1)
    return levels.int(), order.int(), _offsets(groups - levels, groups + 1)


def plan_masks(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # bool [B, N, G]
    """`plan_masks`."""
    masks = masks.transpose(0, 1)
    levels = masks.long().sum(2)
    ranks = _places(levels)
    for bit in reversed(masks.unbind(2)):
        ranks = _ranks((~bit).long(), ranks)
    order = _ranks(-levels, ranks).argsort(1)
    before = order.gather(1, (_places(levels) - 1).clamp(min=0))  # who stands before each; the first itself
    own, other = (masks.gather(1, each[:, :, None].expand_as(masks)) for each in (order, before))
    segments = (own != other).any(2).long().cumsum(1)
    return levels.int(), order.int(), _offsets(segments, levels.shape[1])


def _places(rows: Tensor) -> Tensor:  # [N, B] -> int64 [N, B]: 0..B-1 in each row
    return torch.arange(rows.shape[1], device=rows.device).expand_as(rows)


def _ranks(keys: Tensor, ranks: Tensor) -> Tensor:  # [N, B]
    """Ranks by keys, and by the given ranks where these are equal: a stable sort, which ONNX does not have."""
    return (keys * keys.shape[1] + ranks).argsort(1).argsort(1)


def _offsets(segments: Tensor, count: int) -> Tensor:  # [N, B] -> int32 [N, count + 1]
    """The number of instances before each segment."""
    bounds = torch.arange(count + 1, device=segments.device)
    return (segments[:, None] < bounds[:, None]).sum(2).int()


def convolution(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    *given: Any,  # the tensors of a route, and the fields of a geometry
) -> Tensor:  # [B, C_out, H_out, W_out]
    """`dynamic_conv2d`."""
    geometry = Geometry.of(*given[4:])
    return masked_forward(x, weight, bias, route_of(given[:4], geometry), geometry)


def norm(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:  # [B, C, H, W] -> channels-last, [3, C]
    """`dynamic_batch_norm`."""
    y, statistics = norm_torch(x, *given)
    return y.contiguous(memory_format=torch.channels_last), statistics


def residual(x: Tensor, *given: Any) -> Tensor:  # [B, C, H, W] -> [B, C_out, H_out, W_out] channels-last
    """`dynamic_residual`."""
    route, weights, shortcut = _taken(RESIDUAL, given)
    return _added(x, shortcut, masked_branch(x, route, weights), weights)


def bottleneck(x: Tensor, *given: Any) -> Tensor:  # [B, C, H, W] -> [B, C_out, H_out, W_out] channels-last
    """`dynamic_bottleneck`."""
    route, weights, shortcut = _taken(BOTTLENECK, given)
    used, (R, S) = channels_of(route.selection(), weights.groups)[:, :, None, None], weights.conv2.shape[2:]
    bias1, bias2, bias3 = (
        None if bias is None else bias.to(x.dtype) for bias in (weights.bias1, weights.bias2, weights.bias3)
    )
    h = F.conv2d(activated(x, weights), weights.conv1, bias1).relu()
    h = F.conv2d(
        torch.where(used, h, 0), weights.conv2, bias2, weights.stride, (R // 2, S // 2), groups=weights.cardinality
    )
    y = F.conv2d(torch.where(used, h.relu(), 0), weights.conv3, bias3)
    return _added(x, shortcut, torch.where(used.any(1, keepdim=True), y, 0), weights)


def inverted_residual(x: Tensor, *given: Any) -> Tensor:  # [B, C, H, W] -> [B, C_out, H_out, W_out] channels-last
    """`dynamic_inverted_residual`."""
    route, weights, shortcut = _taken(INVERTED_RESIDUAL, given)
    branch = _inverted_residual_composed.branch(x, route, weights, _in_torch)
    shortcut = x if shortcut is None and weights.skip else shortcut
    return (branch if shortcut is None else branch + shortcut).contiguous(memory_format=torch.channels_last)


def _in_torch(x: Tensor, weight: Tensor, bias: Tensor | None, route: Route, geometry: Geometry) -> Tensor:
    """A dynamic convolution of x [B, C_in, H, W]: [B, C_out, H_out, W_out]."""
    return masked_forward(x, weight, bias, route, geometry)


def graph(x: Tensor, levels: Tensor, order: Tensor, offsets: Tensor, *given: Any) -> Tensor:  # [B, C, H, W]
    """`dynamic_graph`."""
    read_in, gates, read_out, *weights = given
    return run_masked(x, graph_of(*weights), RoutingPlan(levels, order, offsets, 1), read_in, gates, read_out)


def _taken(operands: Operands, given: tuple) -> tuple[Route, Any, Tensor | None]:
    """Route, weights and shortcut of what a block's op takes. Raises ValueError for weights that are gone."""
    count = len(operands)
    weights, shortcut = operands.weights(given[:count]), given[count:]
    if is_stand_in(weights.conv2 if isinstance(weights, ResidualWeights) else weights.conv3):
        raise ValueError(
            f"{_OP}: program must be of a model that is not frozen, as freeze() keeps weights only as the kernels read "
            "them, got frozen ones"
        )
    return operands.route(given[:count]), weights, shortcut[0] if shortcut else None


def _added(x: Tensor, shortcut: Tensor | None, branch: Tensor, weights: ResidualWeights | BottleneckWeights) -> Tensor:
    """The shortcut and the branch, [B, C_out, H_out, W_out], through the ReLU of the sum if there is one."""
    out = own_shortcut(x, weights, shortcut)
    out = out + branch.to(out.dtype)
    return (out.relu() if weights.relu else out).contiguous(memory_format=torch.channels_last)


def in_torch_ops(op: Any, *arguments: Any) -> Any:
    """Return what a registered op makes of its arguments, in operations of PyTorch."""
    warn_of_masks()
    return DECOMPOSED[op._name](*arguments)


def warn_of_masks() -> None:
    """Warn that levels save no time."""
    warnings.warn(
        "masked: the program computes every channel and sets to 0 what an instance did not select, so levels save no "
        "time in it; extract(model, structure) gives one structure that is fast everywhere",
        stacklevel=3,
    )


DECOMPOSED: dict[str, Callable[..., Any]] = {
    "plan_levels": plan_levels,
    "plan_masks": plan_masks,
    "dynamic_conv2d": convolution,
    "dynamic_norm": norm,
    "dynamic_residual": residual,
    "dynamic_bottleneck": bottleneck,
    "dynamic_inverted_residual": inverted_residual,
    "dynamic_graph": graph,
}
