"""Plans, residual blocks and batch norms against the CPU and float64: values, gradients, what must stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_ways import fused_branch
from den_kernels import DynamicBatchNorm2d, RoutingPlan, _cuda, dynamic_residual, dynamic_residual_
from den_kernels.dynamic_norm import dynamic_batch_norm, dynamic_batch_norm_reference
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import as_route
from den_kernels.rows import pool_rows
from den_kernels.testing import make_levels, make_mask
from tests.gpu_blocks import block_case, fold, random_norm
from tests.on_gpu import DTYPES, WAYS, Context, close_by_instance, numerics, relative_error

Record = Callable[[dict[str, Any]], None]
CPU = torch.device("cpu")
NORM_TOLERANCE = {"float32": 2e-5, "tf32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
BLOCK_TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1.5e-2, "float16": 2e-3}
BATCHES = (0, 1, 5, 257, 1024, 4097)


@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize("batch", BATCHES)
def test_plan_of_levels(batch: int, groups: int, context: Context, record: Record) -> None:
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
    record({"kernel": _cuda.plans_levels(context.place, groups)})


@pytest.mark.smoke
def test_plan_first(context: Context, record: Record) -> None:
    test_plan_of_levels(context.size(257, 5), 3, context, record)


@pytest.mark.parametrize("groups", [1, 4, 40, 70])
@pytest.mark.parametrize("batch", BATCHES)
def test_plan_of_masks(batch: int, groups: int, context: Context, record: Record) -> None:
    """The same for masks."""
    masks = torch.stack([make_mask(batch, groups, seed=block, distinct=9) for block in range(5)], dim=1)
    plan, right = (RoutingPlan.from_masks(masks.to(place)) for place in (context.place, "cpu"))
    same_plan(plan, right)
    plan.update_(masks.flip(0).to(context.place))
    same_plan(plan, RoutingPlan.from_masks(masks.flip(0)))
    record({"kernel": _cuda.plans_masks(context.place, groups)})


def same_plan(plan: RoutingPlan, right: RoutingPlan) -> None:
    """Assert that two plans are equal in every byte."""
    for name in ("levels", "order", "offsets"):
        got, expected = getattr(plan, name).cpu(), getattr(right, name)
        assert got.dtype == expected.dtype, f"plan.{name} must be {expected.dtype}, got {got.dtype}"
        assert torch.equal(got, expected), f"plan.{name} differs from the CPU's"


@pytest.mark.parametrize("selection", ["levels", "mask"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_residual(way: str, stride: int, selection: str, context: Context, record: Record) -> None:
    """The functional and the in-place form; an instance at level 0 is exactly its shortcut."""
    block, x, chosen = block_case(way, stride, selection, context)
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
    record({"relative_error": close_by_instance(got, exact, BLOCK_TOLERANCE[way])})


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_fused_residual(way: str, stride: int, context: Context, record: Record) -> None:
    """The fused kernel, called itself: onto a map that holds the shortcut, and into one that holds nothing."""
    block, x, chosen = block_case(way, stride, "levels", context)
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
    record({"relative_error": max(errors)})


@pytest.mark.smoke
def test_fused_residual_first(context: Context, record: Record) -> None:
    test_fused_residual("bfloat16", 1, context, record)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("selection", ["levels", "mask"])
@pytest.mark.parametrize("way", WAYS)
def test_norm(way: str, selection: str, relu: bool, context: Context, record: Record) -> None:
    """Forward, backward and running statistics of a training step, and forward in evaluation."""
    torch.manual_seed(0)
    sizes, batch, side = (5, 11, 24), context.size(37, 3), context.size(15, 4)
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
    record({"errors": errors})


def reference_norm(x: Tensor, chosen: Tensor, *arguments: Tensor, **keywords: Any) -> Tensor:
    """The definition, on a selection."""
    return dynamic_batch_norm_reference(x, as_route(chosen, len(keywords["groups"]), len(x)), *arguments, **keywords)
