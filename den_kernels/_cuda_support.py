"""Support of a GPU by the extension's CUDA kernels: asked once for each GPU, never found out by an error in a launch.

The extension has code for some compute capabilities and PTX for all others, which the driver compiles if it knows that
version of PTX; and it brings its own CUDA runtime, which wants a driver of its major version.
"""

import warnings
from functools import lru_cache

import torch

from ._extension import extension

_OLD_DRIVER = 35  # cudaErrorInsufficientDriver
_NO_CODE = (200, 209, 218, 221, 222, 223)  # no code for the device, or PTX that the driver does not compile

_said: set[str] = set()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def explain(
    code: int,  # of the CUDA runtime: 0 where the kernels run
    text: str,  # what the runtime says of the code
    driver: int,  # the newest CUDA that the driver knows: 12040 is 12.4
    built: tuple[int, int],  # the CUDA that the extension was built with
    archs: list[str],  # that it has code for: "80" is compute capability 8.0
    capability: tuple[int, int],  # of the GPU
) -> str:
    """The reason why the kernels do not run on a GPU and what to do, as one clause; "" where they run.

    >>> explain(0, "no error", 13000, (13, 0), ["80", "90"], (9, 0))
    ''
    >>> explain(2, "out of memory", 13000, (13, 0), ["80", "90"], (9, 0))
    'the CUDA runtime says: out of memory (CUDA error 2)'
    """
    knows, toolkit = _dotted((driver // 1000, driver % 1000 // 10)), _dotted(built)
    if code == 0:
        return ""
    if code == _OLD_DRIVER:
        older = f", or build with a toolkit of CUDA {driver // 1000} (CUDA_HOME) if torch is one for it"
        return (
            f"the driver knows CUDA {knows} and the extension was built with {toolkit}; update the driver to one for "
            f"CUDA {built[0]}{older if 12 <= driver // 1000 < built[0] else ''}"
        )
    if code in _NO_CODE:
        return (
            f"it has compute capability {_dotted(capability)}, the extension has code for "
            f"{', '.join(f'{int(arch) / 10:.1f}' for arch in archs)} (CUDA {toolkit}) and PTX that the driver "
            f"(CUDA {knows}) does not take: {text}; update the driver, or build with a newer CUDA toolkit"
        )
    return f"the CUDA runtime says: {text} (CUDA error {code})"


@lru_cache(maxsize=64)
def refusal(index: int) -> str:
    """Explain why the kernels do not run on GPU `index` of compute capability 8.0 or more; "" where they do."""
    if extension is None or not extension.with_cuda:
        return "the extension was built without CUDA"
    code, text, driver = extension.kernel_status_cuda(index)
    capability = torch.cuda.get_device_capability(index)
    return explain(code, text, driver, extension.cuda_version, extension.cuda_archs, capability)


@lru_cache(maxsize=64)
def _runs(index: int) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False  # as of Triton's kernels, which say so
    reason = refusal(index)
    if reason:
        _warn(f"the CUDA kernels do not run on {torch.cuda.get_device_name(index)}: {reason}")
    return not reason


def _warn(text: str) -> None:
    if text not in _said:
        _said.add(text)
        cost = "Triton's run instead, or PyTorch where it is not installed; a plan takes several launches, not one"
        warnings.warn(f"den_kernels: {text}. {cost}", stacklevel=4)


def runs_on(device: torch.device) -> bool:
    """True where the extension has kernels for a device; else warns once why, from compute capability 8.0 on."""
    if device.type != "cuda" or extension is None or not extension.with_cuda:
        return False
    return _runs(torch.cuda.current_device() if device.index is None else device.index)
