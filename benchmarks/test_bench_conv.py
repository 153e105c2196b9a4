"""The dynamic convolution: output channels, input channels or both chosen per instance, by level or by mask."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import den_kernels
from den_kernels import _triton
from den_kernels._conv_direct import runs_direct
from den_kernels._geometry import Geometry

from . import peers, slicing
from .allocations import require
from .clocks import input_sets
from .harness import TF32, Case, Provider, Settings, Work, expect, provide, run
from .mixes import mix_levels
from .parameters import checked, everywhere
from .shapes import GPU_MIXES, NETWORKS, Shape

SHAPES = (("64x32x32", 32), ("128x16x16", 32), ("256x8x8", 32), ("128x16x16", 128))
SLICED = 32  # images at most for the providers that work image by image
CASES = [
    *[Case(f"conv-{side}-elastic", *shape, "uniform", "float32") for side in ("out", "in") for shape in SHAPES],
    Case("conv-both-elastic", "128x16x16", 32, "uniform", "float32"),
    Case("conv-out-elastic", "128x16x16", 32, "full", "float32"),
    *[Case(f"conv-{side}-elastic", "128x16x16", 32, "uniform", "bfloat16") for side in ("out", "in")],
    *[Case(f"conv-{side}-elastic", "128x16x16", 32, "masks", "float32") for side in ("out", "in")],
]
GPU = [
    Case(f"conv-{side}-elastic", shape, 256, mix, dtype)
    for dtype in ("bfloat16", TF32)
    for shape in NETWORKS
    for side in ("out", "in")
    for mix in GPU_MIXES
    if side == "out" or Shape.parse(shape).keeps
]
TINY = [
    *[Case("conv-out-elastic", "16x6x6", 8, mix, "bfloat16") for mix in ("uniform", "zero")],
    *[Case(f"conv-{side}-elastic", "16x6x6", 8, "uniform", TF32) for side in ("out", "in")],
    Case("conv-out-elastic", "16-32x6x6/2", 8, "full", "bfloat16"),
]
Convolve = Callable[..., Tensor]  # x, weight -> y
COARSE = 2.0**-9  # of the largest value: PyTorch need not round to TF32 where ours does


@dataclass
class Operands:
    """One case's tensors: the plain convolution, the input, and what each instance selects."""

    conv: nn.Conv2d
    inputs: list[Tensor]  # [B, C, H, W] channels-last; input channels not selected hold 0: dense and masked agree
    groups: Tensor  # bool [B, G]
    levels: Tensor | None  # int32 [B], None for masks
    sizes: tuple[int, ...]
    out_elastic: bool
    in_elastic: bool

    @property
    def x(self) -> Tensor:
        """The first of the inputs."""
        return self.inputs[0]

    def elastic(self, dtype: torch.dtype) -> peers.ElasticConv:
        """The convolution in ``dtype`` with its selections of channels."""
        channels = peers.select_channels(self.groups, self.sizes)
        conv = copy.deepcopy(self.conv).to(dtype)
        return peers.ElasticConv(conv, channels if self.out_elastic else None, channels if self.in_elastic else None)

    def to(self, device: str) -> Operands:
        """Copy of the operands on a device."""
        levels = None if self.levels is None else self.levels.to(device)
        inputs = [x.to(device) for x in self.inputs]
        sets = input_sets(torch.device(device), 2 * self.x.nbytes)
        inputs += [torch.randn_like(inputs[0]) for _ in range(sets - 1)]
        moved = self.conv.to(device), inputs, self.groups.to(device), levels
        return Operands(*moved, self.sizes, self.out_elastic, self.in_elastic)


def make_operands(case: Case, seed: int = 0) -> Operands:
    """Random weights in the case's dtype; three groups of ¼, ¼, ½ for levels, four equal ones (each at ½) for masks."""
    torch.manual_seed(seed)
    shape, dtype = Shape.parse(case.shape), case.torch_dtype
    side = case.suite.split("-")[1]
    elastic = Shape(shape.channels, shape.out_channels if side == "out" else shape.channels, shape.size)
    if case.mix == "masks":
        levels, sizes, groups = None, (elastic.out_channels // 4,) * 4, torch.rand(case.batch, 4) < 0.5
    else:
        levels, sizes = mix_levels(case.mix, case.batch), elastic.groups
        groups = torch.arange(3) < levels[:, None]
    x = peers.channels_last(torch.randn(case.batch, shape.channels, shape.size, shape.size))
    if side in ("in", "both"):
        x *= peers.select_channels(groups, sizes)[:, :, None, None]
    conv = nn.Conv2d(shape.channels, shape.out_channels, 3, shape.stride, padding=1, bias=False)
    conv = conv.to(dtype=dtype, memory_format=torch.channels_last)
    return Operands(conv, [x.to(dtype)], groups, levels, sizes, side in ("out", "both"), side in ("in", "both"))


def work_of(operands: Operands) -> Work:
    """2 FLOPs a multiply-add; traffic: the inputs used are read, the output is written, the weights are read once."""
    x, conv = operands.x, operands.conv
    share = (operands.groups.cpu() * torch.tensor(operands.sizes)).sum(1) / sum(operands.sizes)  # [B]
    written = len(x) * conv.out_channels * (-(-x.shape[2] // conv.stride[0])) ** 2
    dense = 2 * 9 * conv.in_channels * written
    used = share ** (operands.out_elastic + operands.in_elastic)
    read = (share if operands.in_elastic else torch.ones_like(share)).mean().item()
    traffic = x.nbytes * read + written * x.element_size() + conv.weight.nbytes
    return Work(dense * used.mean().item(), dense, traffic)


def route_of(operands: Operands) -> den_kernels.Route:
    """The plan's route of the operands' levels or masks."""
    if operands.levels is None:
        return den_kernels.RoutingPlan.from_masks(operands.groups[:, None])[0]
    return den_kernels.RoutingPlan.from_levels(operands.levels[:, None], len(operands.sizes))[0]


def way(operands: Operands) -> str:
    """Name of the implementation that `dynamic_conv2d` takes for the case."""
    if operands.x.device.type != "cpu":
        return "gpu"
    direct = runs_direct(operands.x, operands.conv.weight, geometry_of(operands), False, route_of(operands))
    return "direct" if direct else "onednn"


def geometry_of(operands: Operands) -> Geometry:
    """The convolution as the kernels know it."""
    sizes = [operands.sizes if elastic else () for elastic in (operands.out_elastic, operands.in_elastic)]
    return Geometry(operands.conv.stride, (1, 1), (1, 1), 1, *sizes)


def ours(operands: Operands) -> Convolve:
    """dynamic_conv2d with a route built beforehand."""
    out_groups, in_groups = (operands.sizes if e else None for e in (operands.out_elastic, operands.in_elastic))
    return functools.partial(
        den_kernels.dynamic_conv2d, selection=route_of(operands), stride=operands.conv.stride, padding=1,
        out_groups=out_groups, in_groups=in_groups,
    )  # fmt: skip


def masked(operands: Operands) -> Convolve:
    """The whole convolution, multiplied by masks."""
    mask = peers.select_channels(operands.groups, operands.sizes)[:, :, None, None].to(operands.x)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:  # [B, C, H, W], [C', C, 3, 3]
        scale = mask.to(x.dtype)  # in an oracle another than the case's
        y = F.conv2d(x * scale if operands.in_elastic else x, weight, None, operands.conv.stride, padding=1)
        return y.mul_(scale) if operands.out_elastic else y

    return convolve


def layer_provider(operands: Operands) -> Any:
    """The drop-in layer with the same route, as a callable of x: it packs its weight once."""
    sides = (operands.sizes if elastic else None for elastic in (operands.out_elastic, operands.in_elastic))
    return functools.partial(
        den_kernels.DynamicConv2d.from_conv(operands.conv, *sides).eval(), selection=route_of(operands)
    )


def kernel_provider(operands: Operands) -> Any:
    """The Triton kernel alone, which clears nothing, as a callable; None where it does not run."""
    if not _triton.runs_on(operands.x.device):
        return None
    from den_kernels._triton.convolve import convolve

    route, weight, out = route_of(operands), operands.conv.weight.detach(), torch.zeros_like(operands.conv(operands.x))

    def kernel(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        convolve(x, weight, out, route, geometry_of(operands), skip_empty=True)
        return out

    return kernel


def peer_providers(operands: Operands, coarse: bool = False) -> list[Provider]:
    """Ours, dense, masked, bucketed by selection, image by image, and the bare convolutions.

    coarse: products may be rounded to TF32.
    """
    x, dtype, conv = operands.x, operands.x.dtype, operands.conv
    elastic = operands.elastic(dtype)
    least = COARSE if coarse else 0.0
    selected = expect(lambda d: peers.BucketConv(operands.elastic(d))(x.to(d)), dtype, least=least)
    plain = expect(lambda d: operands.elastic(d).conv(x.to(d)), dtype, least=least)
    bare = expect(lambda d: peers.BareConv(operands.elastic(d), x.to(d), packed=False)(), dtype, least=least)

    weight = conv.weight.detach()
    calls = {
        "ours": functools.partial(ours(operands), weight=weight),
        "ours-layer": layer_provider(operands),
        "ours-kernel": kernel_provider(operands),
        "dense-eager": conv,
    }
    calls |= {"masked": functools.partial(masked(operands), weight=weight), "bucket": peers.BucketConv(elastic)}
    if len(x) <= SLICED and dtype == torch.float32:
        calls |= {"per-instance": slicing.PerInstanceConv(elastic), "grouped": slicing.GroupedConv(elastic, len(x))}
    floors = {"bare": peers.BareConv(elastic, x, packed=False)}
    if peers.can_pack(x):
        calls["dense-packed"] = peers.packed_convolution(conv, x.shape, "none")
        floors["bare-packed"] = peers.BareConv(elastic, x, packed=True)
    there = {name: call for name, call in calls.items() if call is not None}
    return [*provide(there, selected, plain, operands.inputs), *provide(floors, bare)]


@pytest.mark.op
@pytest.mark.conv
@pytest.mark.parametrize("case", [*everywhere(CASES), *checked(GPU, TINY)])
def test_conv(benchmark: Any, case: Case, settings: Settings) -> None:
    require(case.id, Shape.parse(case.shape).values(case.batch))
    with torch.no_grad():
        operands = make_operands(case).to(case.device)
        providers = peer_providers(operands, case.dtype == TF32)
    run(benchmark, case, providers, work_of(operands), settings)
    benchmark.extra_info["way"] = way(operands)
