"""Plans, residual blocks and batch norms against the CPU and float64: values, gradients, what must stay untouched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from den_kernels import (
    DynamicBatchNorm2d,
    DynamicConv2d,
    ResidualWeights,
    RoutingPlan,
    _cuda,
    dynamic_residual,
    dynamic_residual_,
)
from den_kernels.dynamic_norm import dynamic_batch_norm, dynamic_batch_norm_reference
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import Route, as_route
from den_kernels.rows import pool_rows
from den_kernels.testing import make_levels, make_mask

from .gpu_numerics import DTYPES, close_by_instance, numerics, relative_error, ways
from .gpu_worker import BATCH, Check, Context, Unavailable

Row = dict[str, Any]
CPU = torch.device("cpu")
NORM_TOLERANCE = {"float32": 2e-5, "tf32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
BLOCK_TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1.5e-2, "float16": 2e-3}


def checks(context: Context) -> list[Check]:
    """Plans first: all else stands on them."""
    found = [Check(f"plan {name}", run) for name, run in plans(context).items()]
    for way, stride, selection in product(ways(context), (1, 2), ("levels", "mask")):
        run = functools.partial(check_residual, way, stride, selection)
        found.append(Check(f"residual stride {stride}, {selection}/{way}", run))
    for way, stride in product(ways(context), (1, 2)):
        found.append(Check(f"fused residual stride {stride}/{way}", functools.partial(check_fused, way, stride)))
    for way, selection, relu in product(ways(context), ("levels", "mask"), (False, True)):
        run = functools.partial(check_norm, way, selection, relu)
        found.append(Check(f"norm {selection}{', relu' if relu else ''}/{way}", run))
    return found


def plans(context: Context) -> dict[str, Callable[[Context], Row]]:
    """Plans of levels and masks, by size."""
    batches = (1, 5) if context.tiny else (0, 1, 257, 1024, 4097)
    found: dict[str, Callable[[Context], Row]] = {}
    for batch, groups in product(batches, (3,) if context.tiny else (1, 3, 16)):
        found[f"levels B={batch} G={groups}"] = functools.partial(check_plan_of_levels, batch, groups)
    for batch, groups in product(batches, (4,) if context.tiny else (1, 4, 40, 70)):
        found[f"masks B={batch} G={groups}"] = functools.partial(check_plan_of_masks, batch, groups)
    return found


def check_plan_of_levels(batch: int, groups: int, context: Context) -> Row:
    """Byte for byte the plan that a CPU makes, levels out of range clamped, twice, and again after `update_`."""
    outside = 2 if context.is_cuda else 0
    generator = torch.Generator().manual_seed(batch + groups)
    for dtype, blocks in ((torch.int64, 20), (torch.int32, 3)):
        draws = [torch.randint(-outside, groups + 1 + outside, (batch, blocks), generator=generator) for _ in range(2)]
        levels = [draw.to(dtype) for draw in draws]
        right = [RoutingPlan.from_levels(draw.clamp(0, groups), groups) for draw in levels]
        plan = RoutingPlan.from_levels(levels[0].to(context.place), groups)
        same_plan(plan, right[0])
        plan.update_(levels[1].to(context.place))
        same_plan(plan, right[1])
    return {"kernel": _cuda.plans_levels(context.place, groups)}


def check_plan_of_masks(batch: int, groups: int, context: Context) -> Row:
    """The same for masks."""
    masks = torch.stack([make_mask(batch, groups, seed=block, distinct=9) for block in range(5)], dim=1)
    plan, right = (RoutingPlan.from_masks(masks.to(place)) for place in (context.place, "cpu"))
    same_plan(plan, right)
    plan.update_(masks.flip(0).to(context.place))
    same_plan(plan, RoutingPlan.from_masks(masks.flip(0)))
    return {"kernel": _cuda.plans_masks(context.place, groups)}


def same_plan(plan: RoutingPlan, right: RoutingPlan) -> None:
    """Assert that two plans are equal in every byte."""
    for name in ("levels", "order", "offsets"):
        got, expected = getattr(plan, name).cpu(), getattr(right, name)
        assert got.dtype == expected.dtype, f"plan.{name} must be {expected.dtype}, got {got.dtype}"
        assert torch.equal(got, expected), f"plan.{name} differs from the CPU's"


def random_norm(channels: int, like: type[nn.BatchNorm2d] = nn.BatchNorm2d, **keywords: Any) -> nn.BatchNorm2d:
    """With statistics and parameters that matter."""
    norm = like(channels, **keywords).eval()
    for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_var, 0.5, 2)):
        nn.init.uniform_(values, low, high)
    nn.init.normal_(norm.running_mean)
    return norm


def random_block(channels: int, out_channels: int, groups: tuple[int, ...], stride: int) -> tuple[nn.Module, ...]:
    """conv1, bn1, conv2, bn2 of a pre-activation block."""
    hidden = sum(groups)
    conv1 = DynamicConv2d(channels, hidden, 3, stride, 1, bias=False, out_groups=groups)
    conv2 = DynamicConv2d(hidden, out_channels, 3, 1, 1, bias=False, in_groups=groups)
    return conv1, random_norm(channels), conv2, random_norm(hidden)


def fold(block: tuple[nn.Module, ...], dtype: torch.dtype, device: torch.device) -> ResidualWeights:
    """The block's weights in a dtype on a device; norms stay in float32, or float64 of those."""
    conv1, bn1, conv2, bn2 = (copy.deepcopy(module).to(device) for module in block)
    return ResidualWeights.fold(conv1.to(dtype), bn1, conv2.to(dtype), bn2)


def block_problem(
    way: str, stride: int, selection: str, context: Context
) -> tuple[tuple[nn.Module, ...], Tensor, Tensor]:
    """A block, x on the CPU, and a selection in which instance 1 chooses nothing."""
    torch.manual_seed(0)
    channels, batch = context.size(64, 16), context.size(BATCH, 4)
    groups = (channels // 4, channels // 4, channels // 2)
    block = random_block(channels, channels * stride, groups, stride)
    side = context.size(16, 6)
    x = torch.randn(batch, channels, side, side).to(DTYPES[way][0]).contiguous(memory_format=torch.channels_last)
    chosen = make_mask(batch, 3, seed=2) if selection == "mask" else make_levels("uniform", batch, 3)
    chosen[1] = 0
    return block, x, chosen


def check_residual(way: str, stride: int, selection: str, context: Context) -> Row:
    """The functional and the in-place form; an instance at level 0 is exactly its shortcut."""
    block, x, chosen = block_problem(way, stride, selection, context)
    dtype, tf32 = DTYPES[way]
    exact = dynamic_residual_reference(x.double(), as_route(chosen, 3, len(x)), fold(block, torch.float64, CPU))
    weights, here = fold(block, dtype, context.place), x.to(context.place)
    with numerics(tf32), torch.inference_mode():
        got, again = (dynamic_residual(here, chosen.to(context.place), weights) for _ in range(2))
        shortcut = pool_rows(here, exact.shape[1], stride)
        in_place = dynamic_residual_(here.clone(memory_format=torch.channels_last), chosen.to(context.place), weights)
    assert torch.equal(got, again), "two calls give different bits"
    assert torch.equal(got, in_place), "in place gives other bits"
    idle = (chosen if selection == "levels" else chosen.sum(1)) == 0
    assert torch.equal(got[idle], shortcut[idle]), "an instance at level 0 must be its shortcut"
    return {"relative_error": close_by_instance(got, exact, BLOCK_TOLERANCE[way])}


def fused_branch(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights, *, onto: bool = True) -> None:
    """The fused kernel of the extension: out += branch(x), or, not `onto`, out = shortcut + branch. Or Unavailable."""
    layout = _cuda.layout_of(x, route, weights)
    if layout is None:
        raise Unavailable("the fused kernel does not take this block here")
    _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=onto)


def check_fused(way: str, stride: int, context: Context) -> Row:
    """The fused kernel, called itself: onto a map that holds the shortcut, and into one that holds nothing."""
    block, x, chosen = block_problem(way, stride, "levels", context)
    exact = dynamic_residual_reference(x.double(), as_route(chosen, 3, len(x)), fold(block, torch.float64, CPU))
    weights, here = fold(block, DTYPES[way][0], context.place), x.to(context.place)
    route, errors = as_route(chosen.to(context.place), 3, len(x)), []
    with numerics(DTYPES[way][1]), torch.inference_mode():
        for onto in (True, False):
            results = []
            for _ in range(2):
                out = pool_rows(here, exact.shape[1], stride)
                out = out if onto else torch.empty_like(out)
                fused_branch(here, out, route, weights, onto=onto)
                results.append(out)
            assert torch.equal(*results), "two calls give different bits"
            errors.append(close_by_instance(results[0], exact, BLOCK_TOLERANCE[way]))
    return {"relative_error": max(errors)}


def check_norm(way: str, selection: str, relu: bool, context: Context) -> Row:
    """Forward, backward and running statistics of a training step, and forward in evaluation."""
    torch.manual_seed(0)
    sizes, batch, side = (5, 11, 24), context.size(37, 5), context.size(15, 6)
    dtype = DTYPES[way][0]
    x = (torch.randn(batch, sum(sizes), side, side) * 2 + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    seed = torch.randn(x.shape).to(dtype)
    chosen = make_mask(batch, 3, seed=1) if selection == "mask" else make_levels("uniform", batch, 3, seed=1)
    norm = random_norm(sum(sizes), DynamicBatchNorm2d, groups=sizes).train()

    def step(of: torch.dtype, like: torch.dtype, device: torch.device, function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [
            t.detach().to(device, kind).requires_grad_()
            for t, kind in ((x, of), (norm.weight, like), (norm.bias, like))
        ]
        running = [t.detach().clone().to(device, like) for t in (norm.running_mean, norm.running_var)]
        keywords: dict[str, Any] = {"groups": sizes, "relu": relu}
        y = function(leaves[0], chosen.to(device), *leaves[1:], *running, **keywords, training=True)
        dx, dweight, dbias = torch.autograd.grad(y, leaves, seed.to(device, of))
        with torch.no_grad():
            evaluated = function(leaves[0], chosen.to(device), *leaves[1:], *running, **keywords)
        return [y.detach(), dx, dweight, dbias, *running, evaluated]

    with numerics(False):
        first, second = (step(dtype, torch.float32, context.place, dynamic_batch_norm) for _ in range(2))
    exact = step(torch.float64, torch.float64, CPU, reference_norm)
    errors = {}
    for name, got, again, right in zip(
        ("y", "dx", "dweight", "dbias", "running_mean", "running_var", "evaluated"), first, second, exact, strict=True
    ):
        assert torch.equal(got, again), f"{name}: two calls give different bits"
        errors[name] = relative_error(got, right)
        allowed = NORM_TOLERANCE[way]
        assert errors[name] <= allowed, f"{name} errs by {errors[name]:.3g}, allowed are {allowed:.3g}"
    return {"errors": errors}


def reference_norm(x: Tensor, chosen: Tensor, *arguments: Tensor, **keywords: Any) -> Tensor:
    """The definition, on a selection."""
    return dynamic_batch_norm_reference(x, as_route(chosen, len(keywords["groups"]), len(x)), *arguments, **keywords)
