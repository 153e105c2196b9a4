"""Time of a call on the host's clock, and of modules within it; and the allocator's settings that make times fair."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from den.support.device import wait_for

# Parameters of glibc's mallopt (malloc.h) and their values. As found, malloc maps every large tensor anew and faults in
# its pages, which slows the network with the larger tensors most: the dense one.
_SETTINGS = {
    "M_MMAP_THRESHOLD": (-3, 2**30), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}  # fmt: skip


def call_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of `rounds` calls of `run`, after one that is not counted; the device is waited for."""
    seconds = []
    for _ in range(rounds + 1):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def module_seconds(
    modules: Sequence[nn.Module], run: Callable[[], object], device: torch.device, rounds: int
) -> list[float]:
    """Median seconds that each module takes in `rounds` calls of `run`, after one that is not counted.

    0 where it is not called: a block that no image uses may cost nothing. A module that is called more than once in a
    run counts each time.
    """
    started: list[float] = []
    seconds: list[list[float]] = [[] for _ in modules]

    def begin(*_: object) -> None:
        wait_for(device)
        started.append(time.perf_counter())

    def end(n: int) -> Callable[..., None]:
        def stop(*_: object) -> None:
            wait_for(device)
            seconds[n].append(time.perf_counter() - started.pop())

        return stop

    hooks = []
    for n, module in enumerate(modules):
        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end(n))]
    try:
        for _ in range(rounds + 1):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [statistics.median(each[1:]) if len(each) > 1 else 0.0 for each in seconds]


def keep_allocations_on_the_heap() -> str:
    """Keep the memory of freed tensors for reuse, in glibc; returns the settings in words, or why there are none."""
    if platform.libc_ver()[0] != "glibc":
        return "malloc as found (no glibc)"
    mallopt = ctypes.CDLL(None).mallopt
    refused = [name for name, (key, value) in _SETTINGS.items() if mallopt(key, value) != 1]
    words = " ".join(f"{name}={value}" for name, (_, value) in _SETTINGS.items() if name not in refused)
    return words + (f" (refused: {', '.join(refused)})" if refused else "")
