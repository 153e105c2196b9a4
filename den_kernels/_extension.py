"""The compiled extension, or None, and why.

`den_kernels._C` and torch must use one OpenMP runtime: each runtime keeps a pool of threads that spin after a parallel
region, and two pools on the same cores slow each other down several times. Torch's wheels bring a libgomp of their own.
It is already loaded, but only for torch: promoting it to the global scope makes the extension's OpenMP calls resolve to
it. With a torch that uses another OpenMP runtime there is nothing to promote and the extension works all the same.
"""

import ctypes
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from den_kernels._interface import stale


def promote_openmp(torch_folder: Path) -> Path | None:
    """Make the OpenMP runtime that torch brought, if it is loaded, visible to libraries loaded later.

    Returns its path, or None where torch brought none or the system cannot promote a loaded library.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    folders = (torch_folder / "lib", torch_folder.parent / "torch.libs")
    for path in sorted(path for folder in folders for path in folder.glob("lib*omp*.so*")):
        try:
            ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL | os.RTLD_NOW)
            return path
        except OSError:  # there, but not loaded
            continue
    return None


def _load() -> tuple[Any, str]:
    try:
        built = import_module("den_kernels._C")
    except ModuleNotFoundError:
        return None, "den_kernels._C was not built"
    except ImportError as error:
        return None, f"den_kernels._C cannot be loaded: {error}"
    if why := stale(getattr(built, "interface", ""), Path(__file__).parents[1] / "csrc"):
        raise ImportError(why)  # its functions take other arguments: without it, all would be slow and nothing said
    return built, ""


openmp = promote_openmp(Path(torch.__file__).parent)
extension: Any  # den_kernels._C, or None
extension, reason = _load()
