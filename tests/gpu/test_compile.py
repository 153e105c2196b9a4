"""torch.compile, torch.export, torch.library.opcheck and autocast of what runs on a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from den.nn.blocks import ElasticBlock
from den_kernels import RoutingPlan, dynamic_conv2d
from den_kernels._geometry import Geometry
from den_kernels.plan import as_route
from den_kernels.testing import make_mask
from tests.gpu_blocks import plain_case
from tests.on_gpu import Context, relative_error

Record = Callable[[dict[str, Any]], None]
Function = Callable[..., Tensor]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Planned(nn.Module):
    """A block that makes its own plan, so that levels are all that it takes."""

    def __init__(self, block: ElasticBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        return self.block(x, RoutingPlan.from_levels(levels[:, None], 3)[0])


def compiled(module: nn.Module, mode: str) -> Function:
    """As one graph; mode "eager" traces without generating code."""
    torch._dynamo.reset()
    if mode == "eager":
        return torch.compile(module, fullgraph=True, backend="aot_eager")
    return torch.compile(module, fullgraph=True, mode=mode)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("mode", ["eager", "default", "max-autotune"])
def test_compile(mode: str, training: bool, context: Context, record: Record) -> None:
    """One graph without a break, for two routes, agrees with eager; with gradients when training."""
    block, x, levels = plain_case(context)
    module = Planned(block).train(training)
    eager = copy.deepcopy(module)
    function, errors = compiled(module, mode), []
    for chosen in (levels, levels.flip(0)):
        results = []
        for call, owner in ((function, module), (eager, eager)):
            leaf = x.detach().clone(memory_format=torch.channels_last).requires_grad_(training)
            with contextlib.nullcontext() if training else torch.no_grad():
                y = call(leaf, chosen)
            gradients = torch.autograd.grad(y.square().mean(), [leaf, *owner.parameters()]) if training else ()
            results.append([t.clone() for t in (y.detach(), *gradients)])
        errors += [relative_error(one, two) for one, two in zip(*results, strict=True)]
    assert max(errors) <= TOLERANCE[torch.float32], f"compiled and eager differ by {max(errors):.3g}"
    record({"relative_error": max(errors)})


@pytest.mark.traced
def test_export(context: Context, record: Record) -> None:
    """torch.export of a block in evaluation mode, run with other levels than it was exported with."""
    block, x, levels = plain_case(context)
    module = Planned(block)
    with torch.no_grad():
        program = torch.export.export(module, (x, levels))
        got, right = program.module()(x, levels.flip(0)), module(x, levels.flip(0))
    error = relative_error(got, right)
    assert error <= TOLERANCE[torch.float32], f"the exported block differs by {error:.3g}"
    record({"relative_error": error})


def conv_arguments(context: Context) -> tuple:
    block, x, levels = plain_case(context)
    route = as_route(levels, 3, len(x))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, block.conv1.out_groups, ())
    weight = block.conv1.weight.detach()
    return x.requires_grad_(), weight.requires_grad_(), None, route.levels, route.order, route.offsets, None, *geometry


def residual_arguments(context: Context) -> tuple:
    from den_kernels.dynamic_residual import OPERANDS

    block, x, levels = plain_case(context)
    return x, *OPERANDS.of(as_route(levels, 3, len(x)), block.folded())


def norm_arguments(context: Context) -> tuple:
    block, x, levels = plain_case(context)
    norm = block.bn2
    selection = as_route(levels, 3, len(x)).selection()
    return x, selection, None, norm.weight.detach(), norm.bias.detach(), list(norm.groups), norm.eps, True


OPERATORS: dict[str, Callable[[Context], tuple]] = {
    "dynamic_conv2d": conv_arguments,
    "dynamic_residual": residual_arguments,
    "dynamic_residual_": residual_arguments,
    "dynamic_norm": norm_arguments,
    "plan_levels": lambda context: (plain_case(context)[2][:, None], 3),
    "plan_masks": lambda context: (make_mask(5, 3)[:, None].to(context.place),),
}


@pytest.mark.traced
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, context: Context) -> None:
    """torch.library.opcheck on tensors of the device: schema, fake tensors, autograd registration."""
    operator = getattr(torch.ops.den_kernels, name).default
    torch.library.opcheck(operator, OPERATORS[name](context))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_autocast(name: str, context: Context, record: Record) -> None:
    """float32 parameters under autocast: the dtype that comes out, values, and a gradient that is float32."""
    dtype = getattr(torch, name)
    block, x, levels = plain_case(context)
    conv = block.conv1
    x = x.requires_grad_()
    with torch.autocast(context.place.type, dtype):
        y = conv(x, levels)
    assert y.dtype == dtype, f"autocast must give {dtype}, got {y.dtype}"
    exact = dynamic_conv2d(
        x.detach().cpu().double(), conv.weight.detach().cpu().double(), None, levels.cpu(), padding=1,
        out_groups=conv.out_groups,
    )  # fmt: skip
    gradient = torch.autograd.grad(y.float().sum(), conv.weight)[0]
    assert gradient.dtype == torch.float32, f"the weight's gradient must be float32, got {gradient.dtype}"
    error = relative_error(y, exact)
    assert error <= TOLERANCE[dtype], f"autocast errs by {error:.3g}"
    record({"relative_error": error})
