"""Which channel groups run fast on this machine, measured, and why."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .._conv_direct import runs_direct
from .._geometry import group_sizes
from ..layers import DynamicConv2d
from ..plan import RoutingPlan

_OP = "advise"
_LANES = 16  # channels that the kernels take at once: a vector of AVX-512, a side of a tensor core's tile


@dataclass(frozen=True)
class Advice:
    """Measured advice: the share of saved FLOPs that a number of channel groups turns into saved time."""

    groups: int
    sizes: tuple[int, ...]
    realised: float
    """The ideal time of a batch at uniform levels (its share of the FLOPs, of the time of all groups), divided by the
    time measured: 1 is all that can be saved."""
    reason: str

    def __str__(self) -> str:
        return f"{self.groups} groups of {'+'.join(map(str, self.sizes))}: realised {self.realised:.2f}; {self.reason}"


def advise(
    channels: int,
    *,
    groups: Sequence[int] = (2, 4, 8),
    kernel_size: int = 3,
    size: int = 14,
    batch: int = 16,
    repeats: int = 7,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Advice]:
    """Measure a pair of convolutions with `channels` hidden channels for each number of groups, the best first.

    channels: of the hidden map and of the maps before and behind; size: height and width of the maps. The pair is what
    a basic block has; each number of groups runs a batch whose levels are uniform from 1 to G, and one at level G.

    Raises ValueError for numbers of groups that do not divide the channels, and settings below 1.
    """
    for name, value in (("channels", channels), ("size", size), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{_OP}: {name} must be at least 1, got {value}")
    found = [_measure(channels, G, kernel_size, size, batch, repeats, dtype, device) for G in groups]
    return sorted(found, key=lambda advice: -advice.realised)


@torch.no_grad()
def _measure(
    channels: int, G: int, kernel: int, size: int, batch: int, repeats: int, dtype: torch.dtype,
    device: torch.device | str,
) -> Advice:  # fmt: skip
    sizes = group_sizes(G, channels, "groups", op=_OP)
    settings = {"padding": kernel // 2, "device": device, "dtype": dtype}
    first = DynamicConv2d(channels, channels, kernel, out_groups=sizes, **settings)  # type: ignore[arg-type]
    last = DynamicConv2d(channels, channels, kernel, in_groups=sizes, **settings)  # type: ignore[arg-type]
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    uniform = (torch.arange(batch, device=device) % G + 1)[:, None]
    plans = [RoutingPlan.from_levels(own, G)[0] for own in (uniform, torch.full_like(uniform, G))]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for route, into in zip(plans, times, strict=True):
            _wait(x)
            start = time.perf_counter()
            last(first(x, route), route)
            _wait(x)
            into.append(time.perf_counter() - start)
    mixed, full = (median(each[1:]) for each in times)
    return Advice(G, sizes, float(uniform.float().mean()) / G * full / mixed, _reason(sizes[0], x, first))


def _reason(size: int, x: Tensor, conv: DynamicConv2d) -> str:
    if x.is_cpu:
        from .._geometry import Geometry

        geometry = Geometry((1, 1), (0, 0), (1, 1), 1, conv.out_groups, ())
        if not runs_direct(x, conv.weight, geometry, packed=True):
            return "no direct kernel here: the instances of a level run together through oneDNN"
    if size % _LANES:
        return f"{size} channels leave {-size % _LANES} of the last {_LANES} lanes idle"
    return f"{size} channels fill {size // _LANES} times {_LANES} lanes"


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
