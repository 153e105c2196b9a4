"""How a call is timed: the host's clock, or a GPU's events around a captured graph with the cache flushed before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Call = Callable[[], object]


class Clock(Protocol):
    """Times one call. ``ready`` gives the call in the form that is timed; ``is_host`` whether a plain timer does it."""

    is_host: bool

    def ready(self, call: Call) -> Call: ...

    def seconds(self, call: Call) -> float: ...


class HostClock:
    """CPU work: the call as it is, the process's clock around it."""

    is_host = True

    def __init__(self, tick: Callable[[], float] = time.perf_counter) -> None:
        self._tick = tick

    def ready(self, call: Call) -> Call:
        return call

    def seconds(self, call: Call) -> float:
        start = self._tick()
        call()
        return self._tick() - start


class DeviceClock:
    """GPU work: every provider's call as a CUDA graph, events around it, the last cache overwritten before it.

    Overwriting takes longer than the host needs to queue the graph behind it, so no wait for the host is timed. With a
    CPU as the device nothing is captured and the rest runs alike, which is how this is tested.
    """

    is_host = False

    def __init__(self, device: torch.device) -> None:
        from .gpu_clock import cache_bytes
        from .gpu_worker import Context

        self.device, self.graphs = device, 0
        self._flush = torch.empty(2 * cache_bytes(Context(str(device))), dtype=torch.uint8, device=device)

    def ready(self, call: Call) -> Call:
        from .gpu_clock import capture

        timed, is_graph = capture(call, self.device)
        self.graphs += is_graph
        return timed

    def seconds(self, call: Call) -> float:
        from den_kernels._triton.clock import elapsed

        self._flush.fill_(1)
        return elapsed(call, self.device)


def clock_of(device: str) -> Clock:
    """The clock for the work of a device ("cpu", "cuda", "cuda:1")."""
    return HostClock() if device == "cpu" else DeviceClock(torch.device(device))
