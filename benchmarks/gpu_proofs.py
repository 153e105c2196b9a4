"""What one GPU forward must be: free of waiting for the device, capturable with routes that change, compilable."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import den
from den.nn.blocks import ElasticBlock
from den_kernels import RoutingPlan, dynamic_conv2d
from den_kernels._geometry import Geometry
from den_kernels._triton.clock import recorded
from den_kernels.plan import as_route
from den_kernels.testing import make_levels, make_mask

from .elastic_network import TASK
from .gpu_numerics import relative_error
from .gpu_worker import BATCH, Check, Context, synchronize
from .peers import channels_last

Row = dict[str, Any]
Function = Callable[..., Tensor]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def checks(context: Context) -> list[Check]:
    """The modes of torch.compile need a compiler of their own on a CPU: the smallest budget leaves that out."""
    modes = ("eager",) if context.tiny else ("default", "max-autotune")
    return [
        Check("no wait: plan, inference", check_inference_waits_for_nothing),
        Check("no wait: training step", check_training_waits_for_nothing),
        Check("graph: block, new routes", check_block_graph),
        Check("graph: block, new masks", check_mask_graph),
        Check("graph: training step, new routes", check_training_graph),
        Check("graph: network, new routes", functools.partial(check_network_graph, "wrn32_4")),
        *[
            Check(
                f"compile: {'training' if training else 'inference'}, {mode}",
                functools.partial(check_compile, mode, training),
            )
            for mode, training in product(modes, (False, True))
        ],
        Check("export", check_export),
        *[Check(f"opcheck: {name}", functools.partial(check_op, name)) for name in OPERATORS],
        *[Check(f"autocast: {name}", functools.partial(check_autocast, name)) for name in ("bfloat16", "float16")],
    ]


@contextlib.contextmanager
def waiting_is_an_error(context: Context) -> Iterator[None]:
    """torch raises at the first operation that makes the host wait for the device."""
    if not context.is_cuda:
        yield
        return
    synchronize(context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Recording:
    """A call recorded once and replayed: a CUDA graph; on a CPU the call itself. `result` is what it made last."""

    def __init__(self, call: Callable[[], Any], context: Context) -> None:
        def keep() -> None:
            self.result = call()

        self._replay = recorded(keep, context.place)

    def replay(self) -> Any:
        """Run it again; the result."""
        self._replay()
        return self.result


def problem(
    context: Context, dtype: torch.dtype = torch.float32, stride: int = 1
) -> tuple[ElasticBlock, Tensor, Tensor]:
    """A block with statistics that matter, x, and levels, on the device."""
    torch.manual_seed(0)
    channels, batch, side = context.size(64, 16), context.size(BATCH, 4), context.size(16, 6)
    block = ElasticBlock(channels, channels * stride, 4, stride=stride)
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    x = channels_last(torch.randn(batch, channels, side, side, device=context.place, dtype=dtype))
    return block.to(context.place, dtype).eval(), x, make_levels("uniform", batch, 3).to(context.place)


def check_inference_waits_for_nothing(context: Context) -> Row:
    """Plan of levels, plan of masks, convolution, block in place and at stride 2."""
    block, x, levels = problem(context, torch.bfloat16)
    half, _, _ = problem(context, torch.bfloat16, stride=2)
    masks = make_mask(len(x), 3).to(context.place)

    @torch.inference_mode()
    def run() -> None:
        plan = RoutingPlan.from_levels(torch.stack([levels, levels.flip(0)], dim=1), 3)
        y = block(x.clone(memory_format=torch.channels_last), plan[0], inplace=True)
        half(y, plan[1])
        route = RoutingPlan.from_masks(masks[:, None])[0]
        block.conv2(block.conv1(x, route).relu_(), route)

    run()
    with waiting_is_an_error(context):
        run()
    return {}


def training_step(block: ElasticBlock, x: Tensor, route: Any) -> list[Tensor]:
    """Output and all gradients."""
    y = block(x, route)
    return [y, *torch.autograd.grad(y.square().mean(), [x, *block.parameters()])]


def check_training_waits_for_nothing(context: Context) -> Row:
    """Convolutions, batch norms over the instances that use a channel, and their gradients."""
    block, x, levels = problem(context)
    block, x = block.train(), x.requires_grad_()

    def run() -> None:
        training_step(block, x, RoutingPlan.from_levels(levels[:, None], 3)[0])

    run()
    with waiting_is_an_error(context):
        run()
    return {}


def other_routes(batch: int, context: Context) -> list[Tensor]:
    """Levels that a graph was not captured with."""
    kinds = ("zero", "top", "ascending", "last only", "no middle")
    return [make_levels(kind, batch, 3, seed=7).to(context.place) for kind in kinds]


def check_block_graph(context: Context) -> Row:
    """The plan is made anew inside the graph; every replay gives the bits of an eager call."""
    block, x, levels = problem(context, torch.bfloat16)
    chosen = levels[:, None].clone()
    plan = RoutingPlan.from_levels(chosen, 3)

    @torch.inference_mode()
    def run() -> Tensor:
        plan.update_(chosen)
        return block(x, plan[0])

    recording = Recording(run, context)
    for other in other_routes(len(x), context):
        chosen.copy_(other[:, None])
        got = recording.replay()
        with torch.inference_mode():
            right = block(x, as_route(other, 3, len(x)))
        assert torch.equal(got, right), f"a replay differs from the eager call at levels {other.cpu().tolist()}"
    return {}


def check_mask_graph(context: Context) -> Row:
    """The same with masks, through the public convolution."""
    block, x, _ = problem(context, torch.bfloat16)
    chosen = make_mask(len(x), 3)[:, None].to(context.place)
    plan = RoutingPlan.from_masks(chosen)

    @torch.inference_mode()
    def run() -> Tensor:
        plan.update_(chosen)
        return block.conv1(x, plan[0])

    recording = Recording(run, context)
    for seed in (3, 4):
        other = make_mask(len(x), 3, seed=seed, distinct=7).to(context.place)
        chosen.copy_(other[:, None])
        got = recording.replay()
        with torch.inference_mode():
            assert torch.equal(got, block.conv1(x, other)), f"a replay differs from the eager call, masks {seed}"
    return {}


def check_training_graph(context: Context) -> Row:
    """Forward and backward in one graph; replays with other levels give the gradients of an eager step."""
    block, x, levels = problem(context)
    block, x = block.train(), x.requires_grad_()
    chosen = levels[:, None].clone()

    def run() -> list[Tensor]:
        return training_step(block, x, RoutingPlan.from_levels(chosen, 3)[0])

    recording = Recording(run, context)
    for other in other_routes(len(x), context):
        chosen.copy_(other[:, None])
        got = recording.replay()
        right = training_step(block, x, as_route(other, 3, len(x)))
        for one, two in zip(got, right, strict=True):
            assert torch.equal(one, two), f"a replay differs from the eager step at levels {other.cpu().tolist()}"
    return {}


def check_network_graph(name: str, context: Context) -> Row:
    """Plan, stem, all blocks and head as one graph, replayed with other structures."""
    torch.manual_seed(0)
    model = den.create_model("wrn8_1" if context.tiny else name, [TASK]).to(context.place, torch.bfloat16).eval()
    batch, blocks = context.size(BATCH, 2), model.num_blocks
    images = channels_last(torch.randn(batch, 3, TASK.size, TASK.size, device=context.place)).bfloat16()
    chosen = torch.randint(0, model.levels, (batch, blocks), device=context.place)
    plan = RoutingPlan.from_levels(chosen, model.levels - 1)

    @torch.inference_mode()
    def run() -> Tensor:
        plan.update_(chosen)
        return model.estimator(images, TASK, plan)

    recording = Recording(run, context)
    before = recording.replay().clone()
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = torch.randint(0, model.levels, (batch, blocks), device=context.place)
        chosen.copy_(other)
        got = recording.replay()
        with torch.inference_mode():
            right = model.estimator(images, TASK, RoutingPlan.from_levels(other, model.levels - 1))
        assert torch.equal(got, right), "a replay differs from the eager network"
        assert torch.isfinite(got).all(), "a logit is not finite"
    assert not torch.equal(before, got), "other structures gave the same logits"
    return {}


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


def check_compile(mode: str, training: bool, context: Context) -> Row:
    """One graph without a break, for two routes, agrees with eager; with gradients when training."""
    block, x, levels = problem(context)
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
    return {"relative_error": max(errors)}


def check_export(context: Context) -> Row:
    """torch.export of a block in evaluation mode, run with other levels than it was exported with."""
    block, x, levels = problem(context)
    module = Planned(block)
    with torch.no_grad():
        program = torch.export.export(module, (x, levels))
        got, right = program.module()(x, levels.flip(0)), module(x, levels.flip(0))
    error = relative_error(got, right)
    assert error <= TOLERANCE[torch.float32], f"the exported block differs by {error:.3g}"
    return {"relative_error": error}


def conv_arguments(context: Context) -> tuple:
    block, x, levels = problem(context)
    route = as_route(levels, 3, len(x))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, block.conv1.out_groups, ())
    weight = block.conv1.weight.detach()
    return x.requires_grad_(), weight.requires_grad_(), None, route.levels, route.order, route.offsets, None, *geometry


def residual_arguments(context: Context) -> tuple:
    from den_kernels.dynamic_residual import OPERANDS

    block, x, levels = problem(context)
    return x, *OPERANDS.of(as_route(levels, 3, len(x)), block.folded())


def norm_arguments(context: Context) -> tuple:
    block, x, levels = problem(context)
    norm = block.bn2
    selection = as_route(levels, 3, len(x)).selection()
    return x, selection, None, norm.weight.detach(), norm.bias.detach(), list(norm.groups), norm.eps, True


OPERATORS: dict[str, Callable[[Context], tuple]] = {
    "dynamic_conv2d": conv_arguments,
    "dynamic_residual": residual_arguments,
    "dynamic_residual_": residual_arguments,
    "dynamic_norm": norm_arguments,
    "plan_levels": lambda context: (problem(context)[2][:, None], 3),
    "plan_masks": lambda context: (make_mask(5, 3)[:, None].to(context.place),),
}


def check_op(name: str, context: Context) -> Row:
    """torch.library.opcheck on tensors of the device: schema, fake tensors, autograd registration."""
    operator = getattr(torch.ops.den_kernels, name).default
    torch.library.opcheck(operator, OPERATORS[name](context))
    return {}


def check_autocast(name: str, context: Context) -> Row:
    """float32 parameters under autocast: the dtype that comes out, values, and a gradient that is float32."""
    dtype = getattr(torch, name)
    block, x, levels = problem(context)
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
    return {"relative_error": error}
