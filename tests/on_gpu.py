"""What the checks of tests/gpu share: where and how large, ways to compute, poisoned memory, errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_ways import Unavailable
from benchmarks.precision import float32_products

ROOT = Path(__file__).resolve().parents[1]
BATCH = 77  # odd, and more than half of the multiprocessors of any GPU here: fewer instances get no fused kernel
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")

# Names of the ways to compute: the dtype, and whether float32 may be rounded to TF32 (as torch's flag says).
DTYPES = {
    "float32": (torch.float32, False), "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False),
}  # fmt: skip
TF32 = 2.0**-10  # a factor cut to 10 bits of mantissa


WAYS = tuple(DTYPES)


@dataclass(frozen=True)
class Context:
    """Where a check runs, and how large its cases are."""

    device: str = "cuda"
    tiny: bool = False  # sizes for a CPU, or for an interpreter of the kernels

    @property
    def place(self) -> torch.device:
        """The device as torch knows it."""
        return torch.device(self.device)

    @property
    def is_cuda(self) -> bool:
        """Whether there are streams, events and graphs."""
        return self.place.type == "cuda"

    def size(self, full: int, tiny: int) -> int:
        """A size within the budget."""
        return tiny if self.tiny else full


def synchronize(context: Context) -> None:
    """Wait for the device, where there is one to wait for."""
    if context.is_cuda:
        torch.cuda.synchronize()


def find_program(name: str, context: Context) -> str:
    """The path of a tool of the CUDA toolkit. Raises Unavailable where it, or a GPU, is missing."""
    if not context.is_cuda:
        raise Unavailable("a CUDA device is needed")
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if found is None:
        raise Unavailable(f"{name} is not installed")
    return found


def environment() -> dict[str, str]:
    """For a program that imports what this process imports, the helpers of tests/ included."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])}


@contextlib.contextmanager
def numerics(tf32: bool) -> Iterator[None]:
    """TF32 or not, and uninitialised memory full of NaN, so that an element that nobody wrote is seen."""
    strict, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with float32_products(tf32), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the error over that of the exact values, NaN where there is one."""
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm()
    return ((got - exact).norm() / norm).item() if norm else got.norm().item()


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on a device with the strides and the offset that it has in its buffer, which goes along."""
    if x.numel() == 0 or x.device == device:
        return x.to(device)
    offset = x.storage_offset()
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    buffer = x.as_strided((end,), (1,), 0).to(device)
    return buffer.as_strided(x.shape, x.stride(), offset)


def close_by_instance(got: Tensor, exact: Tensor, tolerance: float) -> float:
    """Assert a tolerance for every instance and every element; the largest relative error of an instance.

    Relative to the root mean square of an instance no element may err by more than eight tolerances.
    """
    got, exact = got.detach().double().cpu().flatten(1), exact.double().flatten(1)
    assert torch.isfinite(got).all(), "a value is NaN or infinite"
    error, size = got - exact, exact.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    whole = (error.square().mean(1, keepdim=True).sqrt() / size).flatten()
    worst = int(whole.argmax())
    assert whole[worst] <= tolerance, f"instance {worst} errs by {whole[worst]:.3g}, allowed are {tolerance:.3g}"
    single = (error.abs() / size).max().item()
    assert single <= 8 * tolerance, f"an element errs by {single:.3g} of its instance, allowed are {8 * tolerance:.3g}"
    return float(whole[worst])
