"""The inference residual block: x + conv2(relu(bn2(conv1(relu(bn1(x)))))) over the hidden channels of each instance."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import den_kernels

from . import peers, slicing
from .allocations import require
from .harness import DTYPES, Case, Expected, Provider, Settings, Work, dense_role, expect, run
from .mixes import mix_levels
from .parameters import everywhere, extra

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


@dataclass
class Problem:
    """One case's tensors: the dense block, the input, the levels."""

    block: peers.PreactBlock
    x: Tensor  # [B, C, H, W] channels-last
    levels: Tensor  # int32 [B]
    sizes: tuple[int, ...]  # hidden channels of each group

    @property
    def selection(self) -> Tensor:
        """bool [B, M]: the hidden channels each instance uses."""
        return peers.select_levels(self.levels, self.sizes)

    def in_dtype(self, dtype: torch.dtype) -> tuple[peers.PreactBlock, Tensor]:
        """Block and input in another dtype, on the CPU (the values stay those of the case's)."""
        return copy.deepcopy(self.block).to("cpu", dtype), self.x.to("cpu", dtype)

    def to(self, device: str) -> Problem:
        """The same on a device."""
        return Problem(self.block.to(device), self.x.to(device), self.levels.to(device), self.sizes)


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Random weights and statistics, all in the case's dtype and channels-last; groups of ¼, ¼ and ½."""
    torch.manual_seed(seed)
    channels, side, _ = (int(number) for number in case.shape.split("x"))
    dtype = DTYPES[case.dtype]
    conv1, conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
    bn1, bn2 = (nn.BatchNorm2d(channels) for _ in range(2))
    for bn in (bn1, bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.2)
        bn.running_mean.normal_(std=0.2)
        bn.running_var.uniform_(0.5, 1.5)
    block = peers.PreactBlock(conv1, bn1, conv2, bn2).eval().to(dtype=dtype, memory_format=torch.channels_last)
    x = peers.channels_last(torch.randn(case.batch, channels, side, side)).to(dtype)
    quarter = channels // 4
    return Problem(block, x, mix_levels(case.mix, case.batch), (quarter, quarter, channels - 2 * quarter))


def work_of(problem: Problem) -> Work:
    """2 FLOPs a multiply-add of both convolutions; traffic: one read and one write of x, one read of the weights."""
    batch, channels, height, width = problem.x.shape
    per_channel = 2 * 2 * 9 * channels * height * width
    hidden = problem.selection.sum().item()
    traffic = 2 * problem.x.nbytes + (2 * problem.block.conv1.weight.nbytes if hidden else 0)
    return Work(per_channel * hidden, per_channel * channels * batch, traffic)


def fold(problem: Problem) -> den_kernels.ResidualWeights:
    """The block's weights as dynamic_residual takes them."""
    block = copy.deepcopy(problem.block)
    conv1 = den_kernels.DynamicConv2d.from_conv(block.conv1, out_groups=problem.sizes)
    conv2 = den_kernels.DynamicConv2d.from_conv(block.conv2, in_groups=problem.sizes)
    return den_kernels.ResidualWeights.fold(conv1, block.bn1, conv2, block.bn2)


def expectation(problem: Problem) -> Expected:
    """The oracle with the chosen levels."""

    def bucket(dtype: torch.dtype) -> Tensor:
        block, x = problem.in_dtype(dtype)
        return peers.BucketBlock(block, problem.selection.cpu())(x)

    return expect(bucket, problem.x.dtype, FACTOR)


@functools.lru_cache(maxsize=len(DTYPES))
def dense_expectation(shape: str, batch: int, dtype: str) -> Expected:
    """The oracle at full structure: the mixes of a shape share block and input, and so this."""
    problem = make_problem(Case("residual", shape, batch, "full", dtype))

    def dense(dtype: torch.dtype) -> Tensor:
        block, x = problem.in_dtype(dtype)
        return block(x)

    return expect(dense, problem.x.dtype, FACTOR)


def our_providers(case: Case, problem: Problem, expected: Expected) -> list[Provider]:
    """dynamic_residual: into a new tensor, with the plan built in the timing, and in place as a network runs it."""
    x, groups, weights = problem.x, len(problem.sizes), fold(problem)
    route = den_kernels.RoutingPlan.from_levels(problem.levels[:, None], groups)[0]
    scratch = torch.empty_like(x)

    def with_plan() -> Tensor:
        fresh = den_kernels.RoutingPlan.from_levels(problem.levels[:, None], groups)[0]
        return den_kernels.dynamic_residual(x, fresh, weights)

    def in_place() -> Tensor:
        den_kernels.dynamic_residual_(scratch, route, weights)
        return scratch

    found = [
        Provider("ours", "ours", lambda: den_kernels.dynamic_residual(x, route, weights), expected),
        Provider("ours-inplace", "ours", in_place, expected, prepare=lambda: scratch.copy_(x)),
    ]
    if case.mix == "uniform":
        found.append(Provider("ours-plan", "ours", with_plan, expected))
    return found


def dense_providers(case: Case, problem: Problem, expected: Expected, settings: Settings) -> list[Provider]:
    """The block at full structure: eager, bn2 folded, weights packed, compiled where the settings ask for it."""
    x, block = problem.x, problem.block
    blocks: dict[str, Any] = {"dense-eager": block, "dense-folded": peers.FoldedBlock(block)}
    if peers.can_pack(x):
        blocks["dense-packed"] = peers.PackedBlock(block, x.shape)
    if settings.compile == "all" and case.mix == "uniform":
        function = peers.compiled(copy.deepcopy(block), x)
        if function is not None:
            blocks["dense-compiled"] = function
    return [Provider(name, dense_role(name), functools.partial(call, x), expected) for name, call in blocks.items()]


def other_providers(case: Case, problem: Problem, expected: Expected) -> list[Provider]:
    """What one would do instead with the levels, in plain PyTorch, and the bare convolutions of the levels."""
    if case.mix in ("full", "zero"):
        return []
    x, block, selection = problem.x, problem.block, problem.selection
    blocks: dict[str, Any] = {"bucket": peers.BucketBlock(block, selection)}
    if case.mix == "uniform":
        blocks["masked"] = peers.MaskedBlock(block, selection)
    if case.mix == "uniform" and len(x) <= SLICED and case.dtype == "float32":
        blocks["per-instance"] = slicing.PerInstanceBlock(block, selection)
        blocks["grouped"] = slicing.GroupedBlock(block, selection)
    found = [Provider(name, "alternative", functools.partial(call, x), expected) for name, call in blocks.items()]
    return [*found, *bare_providers(problem)]


def bare_providers(problem: Problem) -> list[Provider]:
    """The floors: oneDNN convolutions of the levels, plain and with packed weights."""

    def bare(dtype: torch.dtype) -> list[Tensor]:
        block, x = problem.in_dtype(dtype)
        return peers.BareBlock(block, x, problem.selection.cpu(), packed=False)()

    expected = expect(bare, problem.x.dtype, FACTOR)
    names = {"bare": False} | ({"bare-packed": True} if peers.can_pack(problem.x) else {})
    return [
        Provider(name, "floor", peers.BareBlock(problem.block, problem.x, problem.selection, packed), expected)
        for name, packed in names.items()
    ]


def way(problem: Problem) -> str:
    """Which of its implementations `dynamic_residual` takes for the case."""
    weights = fold(problem)
    if problem.x.device.type != "cpu":
        return "gpu"
    return "direct" if weights.direct is not None else "onednn"


@pytest.mark.op
@pytest.mark.residual
@pytest.mark.parametrize("case", [*everywhere(CASES), *extra(REST)])
def test_residual(benchmark: Any, case: Case, settings: Settings) -> None:
    run_block(benchmark, case, settings)


def run_block(benchmark: Any, case: Case, settings: Settings) -> None:
    """Check and time a case."""
    channels, side, _ = map(int, case.shape.split("x"))
    require(case.id, case.batch * channels * side * side)
    with torch.no_grad():
        problem = make_problem(case).to(case.device)
        expected, dense_expected = expectation(problem), dense_expectation(case.shape, case.batch, case.dtype)
        providers = [
            *our_providers(case, problem, expected),
            *dense_providers(case, problem, dense_expected, settings),
            *other_providers(case, problem, expected),
        ]
    run(benchmark, case, providers, work_of(problem), settings)
    benchmark.extra_info["way"] = way(problem)
