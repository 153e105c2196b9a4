"""The dynamic convolution: output channels, input channels or both chosen per instance, by level or by mask."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import den_kernels
from den_kernels._geometry import Geometry
from den_kernels.dynamic_conv import uses_direct

from . import peers, slicing
from .allocations import require
from .harness import DTYPES, Case, Provider, Settings, Work, expect, run
from .mixes import mix_levels
from .parameters import everywhere

SHAPES = (("64x32x32", 32), ("128x16x16", 32), ("256x8x8", 32), ("128x16x16", 128))
SLICED = 32  # images at most for the providers that work image by image
CASES = [
    *[Case(f"conv-{side}-elastic", *shape, "uniform", "float32") for side in ("out", "in") for shape in SHAPES],
    Case("conv-both-elastic", "128x16x16", 32, "uniform", "float32"),
    Case("conv-out-elastic", "128x16x16", 32, "full", "float32"),
    *[Case(f"conv-{side}-elastic", "128x16x16", 32, "uniform", "bfloat16") for side in ("out", "in")],
    *[Case(f"conv-{side}-elastic", "128x16x16", 32, "masks", "float32") for side in ("out", "in")],
]


@dataclass
class Problem:
    """One case's tensors: the plain convolution, the input, and what each instance selects."""

    conv: nn.Conv2d
    x: Tensor  # [B, C, H, W] channels-last; input channels not selected hold zeros, so that dense and masked agree
    groups: Tensor  # bool [B, G]
    levels: Tensor | None  # int32 [B], None for masks
    sizes: tuple[int, ...]
    out_elastic: bool
    in_elastic: bool

    def elastic(self, dtype: torch.dtype, device: str = "cpu") -> peers.ElasticConv:
        """The convolution in ``dtype`` with its selections of channels."""
        channels = peers.select_channels(self.groups, self.sizes).to(device)
        conv = copy.deepcopy(self.conv).to(device, dtype)
        return peers.ElasticConv(conv, channels if self.out_elastic else None, channels if self.in_elastic else None)

    def to(self, device: str) -> Problem:
        """The same on a device."""
        levels = None if self.levels is None else self.levels.to(device)
        moved = self.conv.to(device), self.x.to(device), self.groups.to(device), levels
        return Problem(*moved, self.sizes, self.out_elastic, self.in_elastic)


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Random weights in the case's dtype; three groups of ¼, ¼, ½ for levels, four equal ones (each at ½) for masks."""
    torch.manual_seed(seed)
    channels, side, _ = (int(number) for number in case.shape.split("x"))
    quarter, dtype = channels // 4, DTYPES[case.dtype]
    if case.mix == "masks":
        levels, sizes, groups = None, (quarter,) * 4, torch.rand(case.batch, 4) < 0.5
    else:
        levels, sizes = mix_levels(case.mix, case.batch), (quarter, quarter, channels - 2 * quarter)
        groups = torch.arange(3) < levels[:, None]
    elastic_side = case.suite.split("-")[1]
    x = peers.channels_last(torch.randn(case.batch, channels, side, side))
    if elastic_side in ("in", "both"):
        x *= peers.select_channels(groups, sizes)[:, :, None, None]
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(dtype=dtype, memory_format=torch.channels_last)
    return Problem(
        conv, x.to(dtype), groups, levels, sizes, elastic_side in ("out", "both"), elastic_side in ("in", "both")
    )


def work_of(problem: Problem) -> Work:
    """2 FLOPs a multiply-add; traffic is one read of the channels used, one write of the output, one of the weights."""
    x = problem.x
    batch, channels, height, width = x.shape
    share = (problem.groups.cpu() * torch.tensor(problem.sizes)).sum(1) / channels  # [B]
    dense = 2 * 9 * channels * channels * height * width
    used = share ** (problem.out_elastic + problem.in_elastic)
    read = (share if problem.in_elastic else torch.ones_like(share)).mean().item()
    traffic = x.nbytes * (read + 1) + problem.conv.weight.nbytes
    return Work(dense * used.sum().item(), dense * batch, traffic)


def route_of(problem: Problem) -> den_kernels.Route:
    """What each instance selects, planned."""
    if problem.levels is None:
        return den_kernels.RoutingPlan.from_masks(problem.groups[:, None])[0]
    return den_kernels.RoutingPlan.from_levels(problem.levels[:, None], len(problem.sizes))[0]


def way(problem: Problem) -> str:
    """Which of its implementations `dynamic_conv2d` takes for the case."""
    if problem.x.device.type != "cpu":
        return "gpu"
    sizes = [problem.sizes if elastic else () for elastic in (problem.out_elastic, problem.in_elastic)]
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, *sizes)
    return "direct" if uses_direct(problem.x, problem.conv.weight, route_of(problem), geometry) else "onednn"


def our_provider(problem: Problem) -> Any:
    """dynamic_conv2d with a route built beforehand, as a callable."""
    route = route_of(problem)
    out_groups = problem.sizes if problem.out_elastic else None
    in_groups = problem.sizes if problem.in_elastic else None
    weight = problem.conv.weight.detach()
    return lambda: den_kernels.dynamic_conv2d(
        problem.x, weight, None, route, padding=1, out_groups=out_groups, in_groups=in_groups
    )


def peer_providers(problem: Problem) -> list[Provider]:
    """Dense, masked, bucketed by selection, image by image, and the bare convolutions."""
    x, dtype, conv, host = problem.x, problem.x.dtype, problem.conv, problem.x.cpu()
    elastic = problem.elastic(dtype, str(x.device))
    mask = peers.select_channels(problem.groups, problem.sizes)[:, :, None, None].to(dtype)
    selected = expect(lambda d: peers.BucketConv(problem.elastic(d))(host.to(d)), dtype)
    plain = expect(lambda d: problem.elastic(d).conv(host.to(d)), dtype)
    bare = expect(lambda d: peers.BareConv(problem.elastic(d), host.to(d), packed=False)(), dtype)

    def masked() -> Tensor:
        inputs = x * mask if problem.in_elastic else x
        return conv(inputs).mul_(mask) if problem.out_elastic else conv(inputs)

    found = [
        Provider("ours", "ours", our_provider(problem), selected),
        Provider("dense-eager", "dense", lambda: conv(x), plain),
        Provider("masked", "alternative", masked, selected),
        Provider("bucket", "alternative", functools.partial(peers.BucketConv(elastic), x), selected),
        Provider("bare", "floor", peers.BareConv(elastic, x, packed=False), bare),
    ]
    if len(x) <= SLICED and dtype == torch.float32:
        calls = {"per-instance": slicing.PerInstanceConv(elastic), "grouped": slicing.GroupedConv(elastic, len(x))}
        found += [Provider(name, "alternative", functools.partial(call, x), selected) for name, call in calls.items()]
    if peers.can_pack(x):
        packed = peers.packed_convolution(conv, x.shape, "none")
        found.append(Provider("dense-packed", "tuned", lambda: packed(x), plain))
        found.append(Provider("bare-packed", "floor", peers.BareConv(elastic, x, packed=True), bare))
    return found


@pytest.mark.op
@pytest.mark.conv
@pytest.mark.parametrize("case", everywhere(CASES))
def test_conv(benchmark: Any, case: Case, settings: Settings) -> None:
    channels, side, _ = map(int, case.shape.split("x"))
    require(case.id, case.batch * channels * side * side)
    with torch.no_grad():
        problem = make_problem(case).to(case.device)
        providers = peer_providers(problem)
    run(benchmark, case, providers, work_of(problem), settings)
    benchmark.extra_info["way"] = way(problem)
