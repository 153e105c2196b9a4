"""Memory of one call, and cases that do not fit: left out in one line while the rest runs."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MEMINFO = Path("/proc/meminfo")


def call_peak(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that PyTorch's allocator hands out at most at a time during ``call``, above what was held before.

    Memory that a library or our C++ takes by itself does not pass this allocator: a few maps of one image.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    held = highest = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def available() -> int | None:
    """Bytes that the system can still give without swapping; None where it does not say."""
    text = MEMINFO.read_text(encoding="utf-8") if MEMINFO.exists() else ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return None if found is None else int(found.group(1)) * 1024


def require(case: str, maps: int) -> None:
    """Skip a case whose maps, ``maps`` numbers each way, do not fit: about a dozen live at once, in float64."""
    needed, free = 12 * 8 * maps, available()
    if free is not None and needed > free:
        _skip(f"{case}: needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


def _skip(reason: str) -> None:
    """Skip the case at hand; where the checks of a GPU run, there may be no pytest."""
    import pytest

    pytest.skip(reason)


@contextlib.contextmanager
def skip_when_exhausted(case: str) -> Iterator[None]:
    """Turn an allocator's refusal into a skipped case."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        refused = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text
        if not refused:
            raise
        _skip(f"{case}: too little memory: {text.splitlines()[0] if text else 'allocation refused'}")
