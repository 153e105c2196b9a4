"""The GPU kernels in Triton. Nothing here imports triton before a kernel is needed."""

import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=64)
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device; says once why a GPU falls back to PyTorch."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        _warn(f"{device} has compute capability {major}.{minor}, and the kernels need 8.0")
        return False
    if find_spec("triton") is None:
        _warn("triton is not installed")
        return False
    return True


def _warn(reason: str) -> None:
    warnings.warn(
        f"den_kernels: {reason}; every instance computes all channel groups with PyTorch, which saves no time",
        stacklevel=3,
    )
