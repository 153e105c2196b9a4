"""Floors of this machine, measured in the same run: matrix rate and copy bandwidth; and what machine it is."""

import functools
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from den.support.call_time import call_seconds
from den.support.device import CPU
from den_kernels._triton import clock

GPU_SIZE, GPU_COPIED = 8192, 2**31  # of the product and the copy that are timed on a GPU

ROUNDS = 7  # of what is timed on a CPU


@functools.cache
def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s, with the threads that are set now, of a square matrix product in ``dtype`` or of a dense convolution,
    whichever has more: a BLAS need not know the CPU as well as oneDNN does.
    """
    a = torch.randn(size, size).to(dtype)
    x, weight = torch.randn(8, 256, 34, 34), torch.randn(256, 256, 3, 3)
    x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    product = 2 * size**3 / call_seconds(lambda: a @ a, CPU, ROUNDS)
    return max(product, 2 * 8 * 32**2 * weight.numel() / call_seconds(lambda: torch.conv2d(x, weight), CPU, ROUNDS))


@functools.cache
def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes/s read plus written by a copy that is larger than a core's own caches."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / call_seconds(lambda: target.copy_(source), CPU, ROUNDS)


@functools.cache
def rates(dtype: str, device: str) -> tuple[float, float]:
    """FLOP/s of matrix products in a case's dtype and bytes/s of copies, read and written, of a device.

    On a GPU the caller says whether float32 may be rounded to TF32 (`precision.float32_products`), and names it so.
    """
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    if device == "cpu":
        return matrix_rate(kind), copy_bandwidth()
    place = torch.device(device)
    a, b = (torch.randn(GPU_SIZE, GPU_SIZE, device=place).to(kind) for _ in range(2))
    source = torch.randint(0, 256, (GPU_COPIED,), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    multiply = clock.median_seconds(lambda: torch.mm(a, b), place)
    return 2 * GPU_SIZE**3 / multiply, 2 * source.numel() / clock.median_seconds(lambda: target.copy_(source), place)


def floor_seconds(flops: float, traffic: float, rate: float, bandwidth: float) -> float:
    """The least time of a problem: FLOPs over the matrix rate or bytes over the bandwidth, whichever is larger.

    >>> floor_seconds(flops=2e9, traffic=1e6, rate=1e11, bandwidth=1e10)
    0.02
    """
    return max(flops / rate, traffic / bandwidth)


CPUINFO = Path("/proc/cpuinfo")
# The instructions that decide which kernels a CPU runs, ours and oneDNN's, the most first; flags of /proc/cpuinfo.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def _cpu_information() -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo; none where the system has no such file."""
    return read_cpuinfo(CPUINFO.read_text(encoding="utf-8")) if CPUINFO.exists() else {}


def read_cpuinfo(text: str) -> dict[str, str]:
    """The fields of the first CPU in the text of /proc/cpuinfo.

    >>> read_cpuinfo("cpu family\t: 26\\nmodel\t\t: 2\\n\\nmodel\t\t: 3\\n")
    {'cpu family': '26', 'model': '2'}
    """
    fields = (line.partition(":") for line in text.strip().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def processor_name() -> str:
    """The processor's name as the system gives it."""
    return _cpu_information().get("model name") or platform.processor() or platform.machine()


def generation(information: Mapping[str, str]) -> str:
    """Family, model and instructions out of /proc/cpuinfo, which tell apart processors of one name.

    >>> generation({"cpu family": "26", "model": "2", "flags": "fpu avx2 avx512f avx512_bf16"})
    '26 2 avx512_bf16'
    """
    flags = information.get("flags", "").split()
    widest = next((name for name in INSTRUCTIONS if name in flags), "")
    return " ".join(filter(None, (information.get("cpu family"), information.get("model"), widest)))


def machine_name(processor: str, generation: str, cores: int) -> str:
    """The name a results file is kept under.

    >>> machine_name("Intel(R) Xeon(R) Processor @ 2.60GHz", "6 143 amx_bf16", 2)
    'intel-xeon-processor-2.60ghz-6-143-amx-bf16-2-cores'
    """
    words = re.sub(r"\((r|tm)\)", " ", f"{processor} {generation}".lower())
    return "-".join(re.findall(r"[a-z0-9.]+", words)) + f"-{cores}-cores"


def this_machine() -> str:
    """``machine_name`` of the machine this runs on."""
    return machine_name(processor_name(), generation(_cpu_information()), os.cpu_count() or 1)
