"""Times of convolutions, residual blocks and plans on a GPU, against cuDNN and the floors."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den_kernels import DynamicConv2d, ResidualWeights, RoutingPlan, dynamic_conv2d, dynamic_residual, dynamic_residual_
from den_kernels._geometry import Geometry
from den_kernels.plan import Route
from den_kernels.testing import channel_mask, masked_conv2d

from . import peers
from .gpu_blocks import fused_branch, random_norm
from .gpu_clock import RATES, Contender, compete, input_sets
from .gpu_numerics import numerics
from .gpu_worker import Check, Context, Unavailable
from .harness import Work
from .mixes import mix_levels
from .precision import float32_products

Row = dict[str, Any]
Function = Callable[[Tensor], Tensor]
TUNED = "max-autotune"
MIXES = ("full", "uniform", "quarter", "zero")
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "tf32": 2e-3}


class Shape(NamedTuple):
    """A 3 x 3 convolution, or the first one of a block."""

    channels: int
    out_channels: int
    size: int  # of the input map
    stride: int = 1

    @property
    def name(self) -> str:
        """As the results know it."""
        if self.channels == self.out_channels:
            return f"{self.channels}x{self.size}x{self.size}"
        return f"{self.channels}-{self.out_channels}x{self.size}x{self.size}/{self.stride}"

    @property
    def groups(self) -> tuple[int, int, int]:
        """Hidden channel groups of a quarter, a quarter and a half."""
        quarter = self.out_channels // 4
        return quarter, quarter, self.out_channels - 2 * quarter


# WRN-32-4 has all but the last two, ResNet-42 all but the first.
SHAPES = (
    Shape(16, 64, 32), Shape(64, 64, 32), Shape(64, 128, 32, 2), Shape(128, 128, 16), Shape(128, 256, 16, 2),
    Shape(256, 256, 8), Shape(256, 512, 8, 2), Shape(512, 512, 4),
)  # fmt: skip
TINY = (Shape(16, 16, 6), Shape(16, 32, 6, 2))


def batch_of(context: Context) -> int:
    return context.size(256, 8)


def shapes(context: Context) -> tuple[Shape, ...]:
    """Of a size budget."""
    return TINY if context.tiny else SHAPES


def convolution_checks(context: Context) -> list[Check]:
    """Every convolution of the two networks: the first of a block (outputs elastic), the second (inputs elastic)."""
    found = [Check("plan B=1024, N=20", time_plan)]
    for rate in ("bfloat16", "tf32"):
        for shape in shapes(context):
            for side in ("out", "in") if shape.stride == 1 and shape.channels == shape.out_channels else ("out",):
                run = functools.partial(time_convolution, shape, side, rate)
                found.append(Check(f"conv-{side}/{shape.name}/{rate}", run))
    return found


def block_checks(context: Context, mode: str = "default") -> list[Check]:
    """The residual blocks at inference; with "max-autotune", which compiles for long, those that keep their shape."""
    kept = [shape for shape in shapes(context) if shape.channels > 16 or context.tiny]
    if mode == TUNED:
        kept = [shape for shape in kept if shape.stride == 1]
    return [
        Check(f"block/{shape.name}/bfloat16{suffix(mode)}", functools.partial(time_block, shape, "bfloat16", mode))
        for shape in kept
    ]


def suffix(mode: str) -> str:
    """What the name of a case says of how its dense side was compiled."""
    return "" if mode == "default" else f" {mode}"


def routes(context: Context, mixes: tuple[str, ...] = MIXES) -> dict[str, Route]:
    """Of every mix of the levels 0, a quarter, a half, all."""
    batch = batch_of(context)
    return {
        mix: RoutingPlan.from_levels(mix_levels(mix, batch).to(context.place)[:, None], 3)[0] for mix in mixes
    }  # fmt: skip


def random_maps(shape: Shape, dtype: torch.dtype, context: Context) -> list[Tensor]:
    """Inputs [B, C, H, W], as many as do not fit the cache with what is made of them."""
    generator = torch.Generator(context.place).manual_seed(0)
    size = (batch_of(context), shape.channels, shape.size, shape.size)
    out = shape.out_channels * (shape.size // shape.stride) ** 2
    sets = input_sets(context, dtype.itemsize * size[0] * (size[1] * size[2] * size[3] + out))
    made = (torch.randn(size, generator=generator, device=context.place) for _ in range(sets))
    return [peers.channels_last(x.to(dtype)) for x in made]


def shares_of(mix: str, batch: int) -> tuple[float, float]:
    """Mean share of the hidden channels that the instances use, and the share of instances that use any."""
    levels = mix_levels(mix, batch)
    return torch.tensor([0, 0.25, 0.5, 1.0])[levels.long()].mean().item(), (levels > 0).float().mean().item()


def convolution_work(shape: Shape, side: str, mix: str, x: Tensor, written: Tensor) -> Work:
    """2 FLOPs a multiply-add; inputs read where used, outputs written where selected, weights once."""
    share, active = shares_of(mix, len(x))
    dense = 2 * 9 * shape.channels * written.numel()
    read, write = (active, share) if side == "out" else (share, active)
    weights = 9 * shape.channels * shape.out_channels * x.element_size()
    return Work(dense * share, dense, x.nbytes * read + written.nbytes * write + weights)


def time_convolution(shape: Shape, side: str, rate: str, context: Context) -> Row:
    """`dynamic_conv2d` and the kernel alone, which clears nothing, at four mixes of levels, against F.conv2d."""
    dtype, tf32 = RATES[rate]
    with torch.inference_mode(), fast_convolutions(tf32):
        xs = random_maps(shape, dtype, context)
        weight = peers.channels_last(
            torch.randn(shape.out_channels, shape.channels, 3, 3, device=context.place).to(dtype)
        )  # fmt: skip
        keywords: dict[str, Any] = {"stride": shape.stride, "padding": 1}
        sides = {"out_groups": shape.groups} if side == "out" else {"in_groups": shape.groups}
        dense = F.conv2d(xs[0], weight, None, **keywords)
        contenders = [Contender("dense-cudnn", "dense", lambda i: F.conv2d(xs[i], weight, None, **keywords))]
        works, worst = {"dense-cudnn": convolution_work(shape, side, "full", xs[0], dense)}, 0.0
        for mix, route in routes(context).items():
            call = functools.partial(dynamic_conv2d, weight=weight, selection=route, **keywords, **sides)
            worst = max(worst, agrees(call, xs[0], weight, route, rate, keywords | sides))
            found = {f"op {mix}": lambda i, call=call: call(xs[i])}
            kernel = bare_kernel(shape, side, weight, route, dense)
            if kernel is not None and context.is_cuda:
                found[f"kernel {mix}"] = lambda i, kernel=kernel: kernel(xs[i])
            contenders += [Contender(name, "ours", timed) for name, timed in found.items()]
            works |= dict.fromkeys(found, convolution_work(shape, side, mix, xs[0], dense))
        return compete(contenders, len(xs), works, rate, context) | {"shape": shape.name, "relative_error": worst}


@contextlib.contextmanager
def fast_convolutions(tf32: bool) -> Iterator[None]:
    """TF32 by a flag, cuDNN's fastest algorithm."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with float32_products(tf32):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def agrees(
    call: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, route: Route, rate: str, keywords: dict[str, Any]
) -> float:
    """The error of a call against PyTorch's masked convolution in float32 without TF32; AssertionError if too large."""
    with numerics(False):
        exact = masked_conv2d(x.float(), weight.float(), None, route.levels, **keywords)
    error = relative_error_here(call(x), exact)
    assert error <= TOLERANCE[rate], f"the result errs by {error:.3g}, allowed are {TOLERANCE[rate]:.3g}"
    return error


def relative_error_here(got: Tensor, exact: Tensor) -> float:
    """`relative_error` without moving large maps to the host."""
    norm, error = exact.norm(), (got.to(exact.dtype) - exact).norm()
    return (error / norm if norm else error).item()


def bare_kernel(shape: Shape, side: str, weight: Tensor, route: Route, like: Tensor) -> Callable[[Tensor], None] | None:
    """The Triton kernel into memory that is there; None without triton."""
    try:
        from den_kernels._triton.convolve import convolve
    except ImportError:
        return None
    out = torch.zeros_like(like)
    sizes = (shape.groups, ()) if side == "out" else ((), shape.groups)
    geometry = Geometry((shape.stride,) * 2, (1, 1), (1, 1), 1, *sizes)
    return lambda x: convolve(x, weight, out, route, geometry, skip_empty=True)


def time_plan(context: Context) -> Row:
    """From levels [1024, 20] to the plan of all blocks, many in one graph, so that the host does not count."""
    B, N = context.size(1024, 16), context.size(20, 3)
    sets = [torch.randint(0, 4, (B, N), device=context.place) for _ in range(4)]
    plan = RoutingPlan.from_levels(sets[0], 3)
    right = RoutingPlan.from_levels(sets[0].cpu(), 3)
    assert torch.equal(plan.order.cpu(), right.order), "the plan differs from the CPU's"
    contenders = [Contender("plan", "ours", lambda i: RoutingPlan.from_levels(sets[i], 3))]
    with torch.inference_mode():
        return compete(contenders, len(sets), {"plan": Work(0, 0, B * N * 16)}, "bfloat16", context)


def make_block(shape: Shape, dtype: torch.dtype, context: Context) -> peers.PreactBlock:
    """A dense block with random weights. conv2 is small, so that a stream that is added to in place keeps its size."""
    torch.manual_seed(0)
    conv1 = nn.Conv2d(shape.channels, shape.out_channels, 3, shape.stride, 1, bias=False)
    conv2 = nn.Conv2d(shape.out_channels, shape.out_channels, 3, 1, 1, bias=False)
    block = peers.PreactBlock(conv1, random_norm(shape.channels), conv2, random_norm(shape.out_channels))
    return block.to(context.place, dtype, memory_format=torch.channels_last).eval()


def fold(block: peers.PreactBlock, shape: Shape, scale: float = 1.0) -> ResidualWeights:
    """Folded for `dynamic_residual`; the branch `scale` times as large."""
    conv1, conv2 = copy.deepcopy(block.conv1), copy.deepcopy(block.conv2)
    with torch.no_grad():
        conv2.weight.mul_(scale)
    conv1 = DynamicConv2d.from_conv(conv1, out_groups=shape.groups)
    return ResidualWeights.fold(conv1, block.bn1, DynamicConv2d.from_conv(conv2, in_groups=shape.groups), block.bn2)


def block_work(shape: Shape, mix: str, x: Tensor, written: Tensor) -> Work:
    """Both convolutions; the map read and written by the instances above level 0 (all where it changes shape)."""
    share, active = shares_of(mix, len(x))
    dense = 2 * 9 * (shape.channels + shape.out_channels) * written.numel()
    moved = active if shape.stride == 1 and shape.channels == shape.out_channels else 1.0
    weights = 9 * (shape.channels + shape.out_channels) * shape.out_channels * x.element_size()
    return Work(dense * share, dense, (x.nbytes + written.nbytes) * moved + (weights if share else 0))


def dense_blocks(block: peers.PreactBlock, x: Tensor, mode: str, context: Context) -> dict[str, Function]:
    """Eager, bn2 folded, and that compiled."""
    folded = peers.FoldedBlock(block)
    found: dict[str, Function] = {"dense-eager": block, "dense-folded": folded}
    return found | compiled(folded, x, mode, context)


def compiled(module: nn.Module, example: Tensor, mode: str, context: Context) -> dict[str, Function]:
    """The module, bn folded, through torch.compile in a mode; its graph is captured by the clock. {} where it fails."""
    if context.warm or not context.compiles:
        return {}
    try:
        torch._dynamo.reset()
        function = torch.compile(copy.deepcopy(module), mode="max-autotune-no-cudagraphs" if mode == TUNED else None)
        function(example)
    except Exception as error:
        print(f"torch.compile left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return {}
    return {"dense-folded-compiled": function}


def ways_of_ours(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights) -> dict[str, Callable[..., None]]:
    """What `dynamic_residual_` is made of and runs here: Triton launches, the fused kernel; each adds to a map."""
    found: dict[str, Callable[..., None]] = {}
    try:
        from den_kernels._triton.residual import add_branch

        found["composition"] = add_branch
    except ImportError as error:
        print(f"two launches are left out: {error}", flush=True)
    try:
        fused_branch(x, out.clone(memory_format=torch.channels_last), route, weights)
        found["fused"] = fused_branch
    except Unavailable as reason:
        print(f"left out: {reason}", flush=True)
    return found


def time_block(shape: Shape, rate: str, mode: str, context: Context) -> Row:
    """`dynamic_residual_` at four mixes, and what it is made of, against the dense block; in place where that keeps."""
    dtype, _ = RATES[rate]
    with torch.inference_mode(), fast_convolutions(True):
        xs = random_maps(shape, dtype, context)
        block = make_block(shape, dtype, context)
        calls = dense_blocks(block, xs[0], mode, context)
        contenders = [Contender(name, "dense", lambda i, call=call: call(xs[i])) for name, call in calls.items()]
        written, small = calls["dense-eager"](xs[0]), fold(block, shape, 2.0**-16)
        works = dict.fromkeys(calls, block_work(shape, "full", xs[0], written))
        error = check_full_level(block, shape, xs[0], context)
        chosen = routes(context)
        parts = ways_of_ours(xs[0], written, chosen["full"], small) if context.is_cuda else {}
        for mix, route in chosen.items():
            found = {f"op {mix}": lambda i, route=route: dynamic_residual_(xs[i], route, small)}
            for name, part in parts.items():
                found[f"{name} {mix}"] = lambda i, part=part, route=route: part(xs[i], written, route, small)
            contenders += [Contender(name, "ours", call) for name, call in found.items()]
            works |= dict.fromkeys(found, block_work(shape, mix, xs[0], written))
        return compete(contenders, len(xs), works, rate, context) | {"shape": shape.name, "relative_error": error}


def check_full_level(block: peers.PreactBlock, shape: Shape, x: Tensor, context: Context) -> float:
    """Ours and the dense block agree at the full level, and with masks of hidden channels at the uniform mix."""
    worst, weights = 0.0, fold(block, shape)
    exact_block = copy.deepcopy(block).float()
    for mix in ("full", "uniform"):
        route = routes(context, (mix,))[mix]
        got = dynamic_residual(x, route, weights)
        with numerics(False):
            hidden = exact_block.hidden(exact_block.activated(x.float()))
            hidden = torch.where(channel_mask(route.levels, shape.groups)[:, :, None, None], hidden, 0)
            exact = exact_block.hidden_to_output(hidden) + exact_block.shortcut(x.float())
        worst = max(worst, relative_error_here(got, exact))
    assert worst <= 1.5e-2, f"the block errs by {worst:.3g}, allowed are 0.015"
    return worst
