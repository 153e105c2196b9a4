"""The GPU kernels in Triton. Nothing here imports triton before a kernel is needed."""

import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None

_said: set[str] = set()


def runs_on(device: torch.device) -> bool:
    """True where the kernels run on a device; warns once why a GPU falls back to PyTorch."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and properties.major < 8:
        return _refuse(
            f"{device} has compute capability {properties.major}.{properties.minor}, and the kernels need 8.0"
        )
    return HAS_TRITON or _refuse("triton is not installed")


def takes(x: Tensor) -> bool:
    """True where the kernels run for tensors of the dtype and on the device of x [...]."""
    return x.dtype in DTYPES and runs_on(x.device)


def _refuse(reason: str) -> bool:
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"den_kernels: {reason}; every instance computes all channel groups with PyTorch, which saves no time",
            stacklevel=3,
        )
    return False
