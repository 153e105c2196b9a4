"""The machine: what it is, the extension built for it, and its measured ceilings."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from den_kernels._triton.clock import elapsed
from den_kernels.info import describe

from . import gpu_clock
from .gpu_worker import Check, Context, Unavailable
from .precision import float32_products

ROOT = Path(__file__).resolve().parent.parent

# What setup.py takes from pybind11's build helpers, for a machine that has the headers in torch but not the package.
HELPERS = """
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from distutils.ccompiler import CCompiler  # of setuptools

@contextmanager
def ParallelCompile(default):
    one = CCompiler.compile
    def compile(self, sources, *arguments, **keywords):
        with ThreadPool(default) as pool:
            objects = pool.map(lambda source: one(self, [source], *arguments, **keywords), sources)
        return sum(objects, [])
    CCompiler.compile = compile
    try:
        yield
    finally:
        CCompiler.compile = one

def Pybind11Extension(name, sources, cxx_std):
    flags = [f"-std=c++{cxx_std}"]
    return Extension(name, sources, include_dirs=[INCLUDE], extra_compile_args=flags, language="c++")
"""

# Says whether a process that starts now can load the extension, and whether that has the CUDA kernels.
LOADED = """
from den_kernels._extension import extension, reason
print(reason if extension is None else f"cuda {extension.with_cuda}")
"""


def build_checks(context: Context) -> list[Check]:
    """A step of its own: the processes that start after it load what it built."""
    return [Check("extension", build_extension)]


def checks(context: Context) -> list[Check]:
    """Describe, measure."""
    return [
        Check("machine", machine),
        *[Check(f"rate {name}", rate(name)) for name in gpu_clock.RATES],
        Check("rate copy", copy_rate),
    ]


def machine(context: Context) -> dict[str, Any]:
    """Names and versions."""
    facts = describe()
    return {
        "gpu": torch.cuda.get_device_name(context.place) if context.is_cuda else "no GPU",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "versions": facts["versions"] | {"torch": torch.__version__},
        "devices": facts["cuda"]["devices"],
        "extension": facts["extension"],
        "l2_bytes": gpu_clock.cache_bytes(context),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **commit(),
    }


def answer(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
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


@contextlib.contextmanager
def build_helpers() -> Iterator[dict[str, str]]:
    """The environment for setup.py; with the headers of pybind11 that torch brings where pybind11 is not installed."""
    if importlib.util.find_spec("pybind11") is not None:
        yield dict(os.environ)
        return
    include = Path(torch.__file__).parent / "include"
    if not (include / "pybind11" / "pybind11.h").exists():
        raise Unavailable("pybind11 is not installed, and torch does not bring its headers")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pybind11"
        package.mkdir()
        (package / "__init__.py").touch()
        helpers = f"INCLUDE = {str(include)!r}\n{HELPERS}"
        (package / "setup_helpers.py").write_text(helpers, encoding="utf-8")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        yield os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def build_extension(context: Context) -> dict[str, Any]:
    """Build den_kernels._C in place, with CUDA, unless it is there."""
    from den_kernels._extension import extension, reason

    if extension is not None and (extension.with_cuda or not context.is_cuda):
        return {"built": False}
    if not (ROOT / "setup.py").exists():
        raise Unavailable(f"no setup.py in {ROOT} to build with ({reason or 'built without CUDA'})")
    with build_helpers() as environment:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("setup.py failed: " + (done.stderr or done.stdout)[-500:])
    loaded = answer(sys.executable, "-c", LOADED)
    if loaded == "cuda False" and context.is_cuda:
        raise Unavailable("setup.py found no nvcc of CUDA 12.4 or newer: built without the CUDA kernels")
    if loaded not in ("cuda True", "cuda False"):
        raise RuntimeError(f"setup.py succeeded, but a new process says: {loaded or 'an error'}")
    return {"built": True, "reason": reason or "it was built without CUDA"}


def rate(name: str) -> Any:
    """A check that measures the FLOP/s of a large square product of random matrices."""

    def measure(context: Context) -> dict[str, Any]:
        size = context.size(8192, 64)
        dtype, tf32 = gpu_clock.RATES[name]
        a, b = (torch.randn(size, size, device=context.place).to(dtype) for _ in range(2))
        with float32_products(tf32):
            return {"rate": 2 * size**3 / best_of(lambda: a @ b, context)}

    return measure


def copy_rate(context: Context) -> dict[str, Any]:
    """Bytes/s, read and written, of a copy within the device's memory."""
    source = torch.randint(0, 256, (context.size(2**31, 2**16),), dtype=torch.uint8, device=context.place)
    target = torch.empty_like(source)
    return {"rate": 2 * source.numel() / best_of(lambda: target.copy_(source), context)}


def best_of(call: Any, context: Context) -> float:
    """Median seconds of ten calls after three."""
    for _ in range(3):
        call()
    return statistics.median(elapsed(call, context.place) for _ in range(10))


def rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ceilings among the results of this step, by name."""
    return {row["case"].removeprefix("rate "): row["rate"] for row in rows if "rate" in row}
