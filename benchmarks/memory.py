"""Peak resident memory of one network in a process of its own: ``python -m benchmarks.memory PROVIDER CASE``.

What counts (``peak``) is the highest resident size while the network runs, above the size before it was built: weights,
folded and packed copies of them, and the maps alive at once. Freed tensors are given back to the system at once (the
opposite of what timing wants), so that the resident size is what is alive.
"""

import ctypes
import gc
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import peers
from .harness import Case

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = (-3, 2**16)  # glibc's M_MMAP_THRESHOLD: larger blocks are mapped, and unmapped when freed
_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs: resets the peak resident size


def is_measurable() -> bool:
    """True where this system tells a process its peak resident size."""
    return STATUS.exists() and "VmHWM" in STATUS.read_text(encoding="utf-8")


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in bytes."""
    return read_status(STATUS.read_text(encoding="utf-8"), field)


def read_status(text: str, field: str) -> int:
    """A size out of /proc/self/status, in bytes.

    >>> read_status("VmRSS:   12 kB", "VmRSS")
    12288
    """
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"read_status: field must be in the status text, got {field!r}")
    return int(found.group(1)) * 1024


def release() -> None:
    """Give everything that is free back to the system."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def build(provider: str, case: Case) -> Callable[[], torch.Tensor]:
    """The network's forward pass; nothing but what the provider needs stays alive."""
    from .elastic_network import ElasticNetwork

    network = ElasticNetwork.make(case)
    if provider == "ours":
        return network.forward
    if provider == "ours-frozen":
        network.model.freeze()
        return network.forward
    dense, images = network.dense(network.dtype), network.images
    if provider == "dense-folded":
        dense = dense.with_blocks([peers.FoldedBlock(block) for block in dense.blocks])
    return lambda: dense(images)


def measure(provider: str, case: Case) -> dict[str, int]:
    """Bytes above the size before the network was built: the ``peak``, and what is ``kept`` after a forward pass.

    ``working``: the peak of further forward passes above what is kept.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(*_MMAP_THRESHOLD)
    from . import elastic_network  # noqa: F401 (its imports must not count)

    torch.conv2d(torch.ones(1, 16, 8, 8), torch.ones(16, 16, 3, 3))
    release()
    before = resident("VmRSS")
    with torch.inference_mode(False), torch.no_grad():
        forward = build(provider, case)
    release()
    CLEAR.write_text(_RESET_PEAK, encoding="utf-8")
    with torch.inference_mode():
        forward()
        first_peak = resident("VmHWM")
        release()
        kept = resident("VmRSS")
        CLEAR.write_text(_RESET_PEAK, encoding="utf-8")
        for _ in range(3):
            forward()
    peak = resident("VmHWM")
    return {"peak": max(first_peak, peak) - before, "kept": kept - before, "working": peak - kept}


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(measure(sys.argv[1], Case(**json.loads(sys.argv[2])))))
