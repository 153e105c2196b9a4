"""The cases that `den_kernels.tune` tries tiles on: made, and checked against float64."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .._geometry import Geometry
from ..plan import Route, RoutingPlan
from ..testing import channel_mask, masked_conv2d
from . import choice, table
from .convolve import PLAIN, convolution_launch, convolve
from .launch import Launch, architecture
from .weight_gradient import weight_gradient, weight_gradient_launch


class Case(NamedTuple):
    """A case whose best tile becomes an entry of the table: square convolutions of a residual block."""

    kind: str  # of table.KINDS
    channels: int
    size: int  # of the map
    batch: int
    dtype: torch.dtype

    @property
    def key(self) -> table.Key:
        width = choice.ceil_power(self.channels, 16, 512)
        return table.key(self.kind, width, width, self.dtype)

    @property
    def groups(self) -> tuple[int, int, int]:
        """Channel groups of a quarter, a quarter and a half."""
        return self.channels // 4, self.channels // 4, self.channels - 2 * (self.channels // 4)


def cases(kinds: Sequence[str], channels: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """The cases of residual networks on 32 x 32 maps that halve while channels double from 64."""
    return [Case(k, c, max(4, min(32, 2048 // c)), 256, d) for d, k, c in product(dtypes, kinds, channels)]


class Trial:
    """A case with tensors: one side elastic under one mix of levels."""

    def __init__(self, case: Case, side: str, levels: Tensor, device: torch.device) -> None:  # levels [B]
        B, C, P, dtype = case.batch, case.channels, case.size, case.dtype
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator, device=device).to(dtype)
            return made.contiguous(memory_format=torch.channels_last)

        self.case, self.levels = case, levels.to(device)
        self.route: Route = RoutingPlan.from_levels(self.levels[:, None], 3)[0]
        self.out_groups: tuple[int, ...] = case.groups if side == "out" else ()
        self.in_groups: tuple[int, ...] = case.groups if side == "in" else ()
        self.geometry = Geometry((1, 1), (1, 1), (1, 1), 1, self.out_groups, self.in_groups)
        self.x, self.weight, self.grad = normal(B, C, P, P), normal(C, C, 3, 3), normal(B, C, P, P)
        self.out = torch.empty_like(self.x)
        self.exact = self._exact()

    def _exact(self) -> Tensor:
        """The exact result in float64, [B, C, P, P] or of a weight [C, C, 3, 3]; 0 where nothing is written."""
        x, weight, grad = self.x.double(), self.weight.double(), self.grad.double()
        sides = {"out_groups": self.out_groups or None, "in_groups": self.in_groups or None}

        def convolved(x: Tensor, weight: Tensor) -> Tensor:  # [B, C, P, P], [C, C, 3, 3]
            return masked_conv2d(x, weight, None, self.levels, **sides, padding=1)

        if self.case.kind == "weight":
            with torch.enable_grad():
                leaf = weight.requires_grad_()
                return torch.autograd.grad(convolved(x, leaf), leaf, grad)[0]
        return convolved(x, weight)

    def _written(self) -> Tensor:
        """True where the kernel writes the result: bool [B, C, 1, 1], or [] where it writes all."""
        if self.case.kind == "weight" or not self.out_groups:
            return torch.ones((), dtype=torch.bool, device=self.x.device)
        return channel_mask(self.levels, self.out_groups)[:, :, None, None]

    def call(self) -> Tensor:
        """Launch with the tile that the table gives now; return the result, of which some may not be written."""
        if self.case.kind == "weight":
            return weight_gradient(self.grad, self.x, self.weight, self.route, self.geometry)
        convolve(self.x, self.weight, self.out, self.route, self.geometry)
        return self.out

    def launch(self) -> Launch:
        """The launch that `call` makes."""
        where = architecture(self.x.device)
        if self.case.kind == "weight":
            return weight_gradient_launch(self.grad, self.x, (3, 3), self.route, self.geometry, *where)
        return convolution_launch(self.x, self.weight, self.out, self.route, self.geometry, False, False, PLAIN, *where)

    def bits(self) -> Tensor:
        """A fresh copy of the result, 0 where nothing is written."""
        self.out.zero_()
        return self.call().clone()

    def error(self) -> float:
        """The largest error against float64 over what this dtype may err: right up to 1, inf where a NaN is.

        Elements err by up to their rounding, and the largest are some six times the root mean square.
        """
        self.out.fill_(float("nan"))
        got = torch.where(self._written(), self.call(), 0).double()
        eps = 2**-10 if self.case.dtype == torch.float32 else torch.finfo(self.case.dtype).eps
        rms = self.exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        worst = ((got - self.exact).abs().max() / (8 * eps * rms)).item()
        return float("inf") if worst != worst else worst


def even_mix(batch: int) -> Tensor:  # int64 [B]
    """Levels 0..3 in equal numbers, shuffled."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
    return (torch.arange(batch) % 4)[order]


def trials(case: Case, device: torch.device) -> list[Trial]:
    """The trials that are checked and timed for a case; their times count alike."""
    full, mixed = torch.full((case.batch,), 3), even_mix(case.batch)
    pairs = [("out", mixed), ("out", full), ("in", mixed)]
    return [Trial(case, side, levels, device) for side, levels in pairs]


def ragged(case: Case, device: torch.device) -> Trial:
    """An odd batch of odd maps, where one level stands alone."""
    small = case._replace(batch=min(case.batch, 37), size=case.size - 1)
    levels = torch.where(torch.arange(small.batch) == 2, 3, 1)
    return Trial(small, "out", levels, device)
