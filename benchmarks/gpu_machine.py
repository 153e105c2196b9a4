"""The extension built for this machine, what it is, and its ceilings: ``python -m benchmarks.gpu_machine cuda:0``."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from den_kernels.info import describe

from . import floors
from .clocks import cache_bytes
from .precision import float32_products

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent

# Says whether a process that starts now can load the extension, and whether that has the CUDA kernels.
LOADED = """
from den_kernels._extension import extension, reason
print(reason if extension is None else f"cuda {extension.with_cuda}")
"""


def facts(device: str) -> dict[str, Any]:
    """Names and versions, and "rates": FLOP/s of a large product by dtype, and bytes/s of a copy."""
    known, rates = describe(), {}
    for name in ("bfloat16", "float16", "tf32"):
        with float32_products(name == "tf32"):
            rates[name], rates["copy"] = floors.rates(name, device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "versions": known["versions"] | {"torch": torch.__version__},
        "devices": known["cuda"]["devices"],
        "extension": known["extension"],
        "l2_bytes": cache_bytes(torch.device(device)),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **commit(),
        "rates": rates,
    }


def answer(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def driver() -> str | None:
    """The version of the GPU's driver."""
    return answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> dict[str, Any]:
    """The commit of the sources, and whether they have changes; None where git does not know."""
    known = answer("git", "rev-parse", "HEAD")
    return {"commit": known, "modified": bool(answer("git", "status", "--porcelain", "-uno")) if known else None}


def build() -> Row:
    """Build den_kernels._C in place, with CUDA, unless a new process loads one: what that came to, as a check's row."""
    begin = time.monotonic()
    if (before := loaded()) == "cuda True":
        return {"check": "extension", "status": "ok", "built": False, "seconds": 0.0}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    row = {"check": "extension", "before": before} | verdict(done, loaded())
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def loaded() -> str | None:
    """State of the extension in a process that starts now: "cuda True", "cuda False", or why it does not load."""
    return answer(sys.executable, "-c", LOADED)


def verdict(done: subprocess.CompletedProcess, now: str | None) -> Row:
    """Status of a build, by how setup.py ended and by what a new process can load."""
    if done.returncode:
        return {"status": "failed", "error": "setup.py failed: " + (done.stderr or done.stdout)[-500:]}
    if now == "cuda False":
        reason = "setup.py found no nvcc of CUDA 12.4 or newer: built without the CUDA kernels"
        return {"status": "skipped", "reason": reason}
    if now != "cuda True":
        return {"status": "failed", "error": f"setup.py succeeded, but a new process says: {now or 'an error'}"}
    return {"status": "ok", "built": True}


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])), flush=True)
