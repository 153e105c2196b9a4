"""Clocks that time calls: the host's, or a GPU's events around a graph whose inputs are not in its cache."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from den_kernels._triton.clock import elapsed, recorded

Call = Callable[[], object]
SHORTEST = 2e-4  # seconds that one timed replay should take at least


class Timed(NamedTuple):
    """Something ready to be timed: `run` makes `calls` calls, as a captured `graph` or not."""

    run: Call
    calls: int = 1
    graph: bool = False


class HostClock:
    """CPU work: the first call as it is, the process's clock around it."""

    is_host = True  # a plain timer does it

    def __init__(self, tick: Callable[[], float] = time.perf_counter) -> None:
        self._tick = tick

    def ready(self, calls: Sequence[Call]) -> Timed:
        return Timed(calls[0])

    def seconds(self, timed: Timed) -> float:
        start = self._tick()
        timed.run()
        return self._tick() - start


class DeviceClock:
    """GPU work: calls as a CUDA graph, events around it.

    One call is timed behind an overwritten cache; calls on several sets of inputs, which are to be larger than the
    cache, without, and so often in one graph that it is not too short to time. With a CPU as the device nothing is
    captured and the rest runs alike, which is how this is tested.
    """

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)

    def ready(self, calls: Sequence[Call]) -> Timed:
        if len(calls) == 1:
            run, graph = capture(calls[0], self.device)
            return Timed(run, 1, graph)

        def over_sets() -> None:
            for call in calls:
                call()

        over_sets()
        run, graph = capture(over_sets, self.device)
        times = repeats(min(elapsed(run, self.device) for _ in range(2)))  # of the replay, not of the eager calls
        if times > 1:
            run, graph = capture(lambda: [over_sets() for _ in range(times)], self.device)
        return Timed(run, times * len(calls), graph)

    def seconds(self, timed: Timed) -> float:
        if timed.calls == 1:
            self._flush.fill_(1)
        return elapsed(timed.run, self.device) / timed.calls


Clock = HostClock | DeviceClock


def clock_of(device: str) -> Clock:
    """The clock for the work of a device ("cpu", "cuda", "cuda:1")."""
    return HostClock() if device == "cpu" else DeviceClock(torch.device(device))


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache in bytes (64 MiB where torch does not tell it); 1 MiB for a CPU."""
    if device.type != "cuda":
        return 1 << 20
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def input_sets(device: torch.device, bytes_of_a_set: int) -> int:
    """Number of sets of inputs that together exceed three times the cache of a GPU, from 2 to 24; 1 on a CPU.

    >>> input_sets(torch.device("cpu"), 1 << 20)
    1
    """
    if device.type != "cuda":
        return 1
    return max(2, min(24, 1 + math.ceil(3 * cache_bytes(device) / max(bytes_of_a_set, 1))))


def capture(call: Call, device: torch.device) -> tuple[Call, bool]:
    """A replay of the call's graph, and True; where it cannot be captured, or on a CPU, the call itself, and False."""
    if device.type != "cuda":
        return call, False
    try:
        replay = recorded(call, device)
        replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        call()
        return call, False
    return replay, True


def repeats(seconds: float) -> int:
    """Number of runs, at most 16, in one timing of a call that takes so many seconds.

    >>> repeats(1e-3), repeats(6e-5), repeats(1e-6)
    (1, 4, 16)
    """
    return max(1, min(16, math.ceil(SHORTEST / max(seconds, 1e-9))))
