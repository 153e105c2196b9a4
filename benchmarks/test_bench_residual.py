"""The inference residual block: x + conv2(relu(bn2(conv1(relu(bn1(x)))))) over the hidden channels of each instance."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import den_kernels

from . import peers, slicing
from .allocations import require
from .clocks import Call, input_sets
from .gpu_ways import Unavailable, composed_branch, fused_branch
from .harness import DTYPES, Case, Expected, Provider, Settings, Work, expect, provide, run
from .mixes import mix_levels
from .parameters import checked, everywhere, extra
from .shapes import GPU_MIXES, NETWORKS, Shape

STAGES = ("64x32x32", "128x16x16", "256x8x8")  # of WRN-32-4
SHAPES = [*[(stage, batch) for batch in (32, 128) for stage in STAGES], ("16x32x32", 256), ("64x32x32", 8)]
MIXES = ("uniform", "full", "zero", "quarter", "skewed", "one-odd")
# A batch of few images is summed in another order by every provider: 2.4 times the error of plain PyTorch was seen.
FACTOR = 4.0
SLICED = 32  # images at most for the providers that work image by image
DEFAULT = {
    *[(*shape, "uniform", dtype) for shape in SHAPES for dtype in DTYPES],
    *[(*shape, mix, "float32") for shape in SHAPES[:6] for mix in ("full", "zero")],
    *[(stage, 32, mix, "float32") for stage in STAGES for mix in ("quarter", "skewed", "one-odd")],
    *[("128x16x16", 32, mix, "bfloat16") for mix in ("full", "zero", "quarter")],
}
CASES = [
    Case("residual", shape, batch, mix, dtype)
    for shape, batch in SHAPES
    for mix in MIXES
    for dtype in DTYPES
    if (shape, batch, mix, dtype) in DEFAULT
]
REST = [
    Case("residual", shape, batch, mix, dtype)
    for shape, batch in SHAPES
    for mix in MIXES
    for dtype in DTYPES
    if (shape, batch, mix, dtype) not in DEFAULT
]
GPU = [Case("residual", shape, 256, mix, "bfloat16") for shape in NETWORKS[1:] for mix in GPU_MIXES]
TINY = [Case("residual", *shape, "bfloat16") for shape in (("16x6x6", 8, "uniform"), ("16-32x6x6/2", 8, "full"))]


@dataclass
class Operands:
    """One case's tensors: the dense block, the input, the levels."""

    block: peers.PreactBlock
    inputs: list[Tensor]  # [B, C, H, W] channels-last
    levels: Tensor  # int32 [B]
    sizes: tuple[int, ...]  # hidden channels of each group

    @property
    def x(self) -> Tensor:
        """The first of the inputs."""
        return self.inputs[0]

    @property
    def selection(self) -> Tensor:
        """bool [B, M]: the hidden channels each instance uses."""
        return peers.select_levels(self.levels, self.sizes)

    def in_dtype(self, dtype: torch.dtype) -> tuple[peers.PreactBlock, Tensor]:
        """Block and input in another dtype (the values stay those of the case's)."""
        return copy.deepcopy(self.block).to(dtype), self.x.to(dtype)

    def to(self, device: str) -> Operands:
        """Copy of the operands on a device."""
        inputs = [x.to(device) for x in self.inputs]
        sets = input_sets(torch.device(device), 2 * self.x.nbytes)
        inputs += [torch.randn_like(inputs[0]) for _ in range(sets - 1)]
        return Operands(self.block.to(device), inputs, self.levels.to(device), self.sizes)


def make_operands(case: Case, seed: int = 0) -> Operands:
    """Random weights and statistics, all in the case's dtype and channels-last; groups of ¼, ¼ and ½."""
    torch.manual_seed(seed)
    shape, dtype = Shape.parse(case.shape), case.torch_dtype
    conv1 = nn.Conv2d(shape.channels, shape.out_channels, 3, shape.stride, padding=1, bias=False)
    conv2 = nn.Conv2d(shape.out_channels, shape.out_channels, 3, padding=1, bias=False)
    block = peers.PreactBlock(conv1, nn.BatchNorm2d(shape.channels), conv2, nn.BatchNorm2d(shape.out_channels))
    peers.randomise_norms(block)
    block = block.eval().to(dtype=dtype, memory_format=torch.channels_last)
    x = peers.channels_last(torch.randn(case.batch, shape.channels, shape.size, shape.size)).to(dtype)
    return Operands(block, [x], mix_levels(case.mix, case.batch), shape.groups)


def work_of(operands: Operands) -> Work:
    """2 FLOPs a multiply-add of both convolutions; traffic: x read, the output written, the weights read, once."""
    x, block = operands.x, operands.block
    pixels, out = (-(-x.shape[2] // block.conv1.stride[0])) ** 2, block.conv2.out_channels
    per_channel = 2 * 9 * (x.shape[1] + out) * pixels
    hidden = operands.selection.sum().item()
    weights = block.conv1.weight.nbytes + block.conv2.weight.nbytes if hidden else 0
    traffic = x.nbytes + len(x) * out * pixels * x.element_size() + weights
    return Work(per_channel * hidden, per_channel * out * len(x), traffic)


def fold(operands: Operands) -> den_kernels.ResidualWeights:
    """The block's weights as dynamic_residual takes them."""
    block = copy.deepcopy(operands.block)
    conv1 = den_kernels.DynamicConv2d.from_conv(block.conv1, out_groups=operands.sizes)
    conv2 = den_kernels.DynamicConv2d.from_conv(block.conv2, in_groups=operands.sizes)
    return den_kernels.ResidualWeights.fold(conv1, block.bn1, conv2, block.bn2)


def expectation(operands: Operands) -> Expected:
    """The oracle with the chosen levels."""

    def bucket(dtype: torch.dtype) -> Tensor:
        block, x = operands.in_dtype(dtype)
        return peers.BucketBlock(block, operands.selection)(x)

    return expect(bucket, operands.x.dtype, FACTOR)


@functools.lru_cache(maxsize=len(DTYPES))
def dense_expectation(shape: str, batch: int, dtype: str, device: str) -> Expected:
    """The oracle at full structure: the mixes of a shape share block and input, and so this."""
    operands = make_operands(Case("residual", shape, batch, "full", dtype)).to(device)

    def dense(dtype: torch.dtype) -> Tensor:
        block, x = operands.in_dtype(dtype)
        return block(x)

    return expect(dense, operands.x.dtype, FACTOR)


def our_providers(case: Case, operands: Operands, expected: Expected) -> list[Provider]:
    """dynamic_residual: into a new tensor, with the plan built in the timing, and in place as a network runs it."""
    inputs, groups, weights = operands.inputs, len(operands.sizes), fold(operands)
    route = den_kernels.RoutingPlan.from_levels(operands.levels[:, None], groups)[0]

    def block(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        return den_kernels.dynamic_residual(x, route, weights)

    def with_plan(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        fresh = den_kernels.RoutingPlan.from_levels(operands.levels[:, None], groups)[0]
        return den_kernels.dynamic_residual(x, fresh, weights)

    calls = {"ours": block} | ({"ours-plan": with_plan} if case.mix == "uniform" else {})
    found = provide(calls, expected, inputs=inputs)
    if Shape.parse(case.shape).keeps:
        maps = [torch.empty_like(x) for x in inputs]
        in_place = [functools.partial(den_kernels.dynamic_residual_, out, route, weights) for out in maps]
        found.append(onto("ours-inplace", in_place, maps, inputs, expected))
    return found + ([] if case.device == "cpu" else branch_providers(operands, route, weights, expected))


def branch_providers(
    operands: Operands, route: den_kernels.Route, weights: den_kernels.ResidualWeights, expected: Expected
) -> list[Provider]:
    """The GPU's two ways to compute the block: launches of Triton; the fused kernel, where it takes the block."""
    found = []
    shortcuts = [peers.channels_last(operands.block.shortcut(x)) for x in operands.inputs]
    outs = [torch.empty_like(shortcut) for shortcut in shortcuts]
    for name, way in (("ours-composed", composed_branch), ("ours-fused", fused_branch)):
        pairs = zip(operands.inputs, outs, strict=True)
        calls = [functools.partial(way, x, out, route, weights) for x, out in pairs]
        try:
            calls[0]()
            found.append(onto(name, calls, outs, shortcuts, expected))
        except Unavailable as reason:
            print(f"{name} is left out: {reason}", flush=True)
    return found


def onto(
    name: str, calls: Sequence[Call], outs: Sequence[Tensor], shortcuts: Sequence[Tensor], expected: Expected
) -> Provider:
    """Provider of calls that add a branch to ``outs``, which hold the shortcuts before the calls are timed.

    outs, shortcuts: maps [B, C', H', W'], one for each call.
    """

    def first() -> Tensor:
        calls[0]()
        return outs[0]

    def prepare() -> None:
        for out, shortcut in zip(outs, shortcuts, strict=True):
            out.copy_(shortcut)

    return Provider(name, first, expected, prepare, calls[1:])


def dense_providers(case: Case, operands: Operands, expected: Expected, settings: Settings) -> list[Provider]:
    """The block at full structure: eager, bn2 folded, weights packed, compiled where the settings ask for it."""
    x, block = operands.x, operands.block
    blocks: dict[str, Any] = {"dense-eager": block, "dense-folded": peers.FoldedBlock(block)}
    if peers.can_pack(x):
        blocks["dense-packed"] = peers.PackedBlock(block, x.shape)
    if settings.compile == "all" and (case.mix == "uniform" or case.device != "cpu"):
        function = compiled_block(case.shape, case.batch, case.dtype, case.device, settings.autotune)
        if function is not None:
            blocks["dense-compiled"] = function
    return provide(blocks, expected, inputs=operands.inputs)


@functools.lru_cache(maxsize=1)
def compiled_block(
    shape: str, batch: int, dtype: str, device: str, autotune: bool
) -> Callable[[Tensor], Tensor] | None:
    """The dense block compiled, which the mixes of a shape share."""
    operands = make_operands(Case("residual", shape, batch, "full", dtype)).to(device)
    return peers.compiled(operands.block, operands.x, autotune)


def other_providers(case: Case, operands: Operands, expected: Expected) -> list[Provider]:
    """Providers that use the levels in plain PyTorch, and the bare convolutions of the levels."""
    if case.mix in ("full", "zero"):
        return []
    x, block, selection = operands.x, operands.block, operands.selection
    blocks: dict[str, Any] = {"bucket": peers.BucketBlock(block, selection)}
    if case.mix == "uniform":
        blocks["masked"] = peers.MaskedBlock(block, selection)
    if case.mix == "uniform" and len(x) <= SLICED and case.dtype == "float32":
        blocks["per-instance"] = slicing.PerInstanceBlock(block, selection)
        blocks["grouped"] = slicing.GroupedBlock(block, selection)
    return [*provide(blocks, expected, inputs=operands.inputs), *bare_providers(operands)]


def bare_providers(operands: Operands) -> list[Provider]:
    """The floors: oneDNN convolutions of the levels, plain and with packed weights."""

    def bare(dtype: torch.dtype) -> list[Tensor]:
        block, x = operands.in_dtype(dtype)
        return peers.BareBlock(block, x, operands.selection, packed=False)()

    expected = expect(bare, operands.x.dtype, FACTOR)
    names = {"bare": False} | ({"bare-packed": True} if peers.can_pack(operands.x) else {})
    blocks = {
        name: peers.BareBlock(operands.block, operands.x, operands.selection, packed) for name, packed in names.items()
    }
    return provide(blocks, expected)


def way(operands: Operands) -> str:
    """Name of the implementation that `dynamic_residual` takes for the case."""
    weights = fold(operands)
    if operands.x.device.type != "cpu":
        return "gpu"
    return "direct" if weights.direct is not None else "onednn"


@pytest.mark.op
@pytest.mark.residual
@pytest.mark.parametrize("case", [*everywhere(CASES), *extra(REST), *checked(GPU, TINY)])
def test_residual(benchmark: Any, case: Case, settings: Settings) -> None:
    run_block(benchmark, case, settings)


def run_block(benchmark: Any, case: Case, settings: Settings) -> None:
    """Check and time a case."""
    require(case.id, Shape.parse(case.shape).values(case.batch))
    with torch.no_grad():
        operands = make_operands(case).to(case.device)
        expected = expectation(operands)
        dense_expected = dense_expectation(case.shape, case.batch, case.dtype, case.device)
        providers = [
            *our_providers(case, operands, expected),
            *dense_providers(case, operands, dense_expected, settings),
            *other_providers(case, operands, expected),
        ]
    run(benchmark, case, providers, work_of(operands), settings)
    benchmark.extra_info["way"] = way(operands)
