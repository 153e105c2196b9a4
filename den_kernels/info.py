"""A report on this installation: its parts, the active implementations, what is missing and what that costs."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from . import __version__, _cuda_support, _extension
from ._triton import rules

_OPS = (
    "routing plan", "dynamic convolution", "dynamic batch norm", "residual block, inference",
    "bottleneck block, inference", "inverted residual, inference", "graph of convolutions, inference",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def describe() -> dict[str, Any]:
    """Facts about this installation and machine; JSON-able. Asks the CUDA runtime for its devices."""
    cuda = _cuda()
    return {
        "versions": {
            "den_kernels": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "triton", "numpy")},
        },
        "cpu": _cpu(),
        "cuda": cuda,
        "extension": _describe_extension(),
        "implementations": {"cpu": _on_cpu(), "cuda": _on_cuda(cuda)},
        "missing": _missing(cuda),
    }


def format_report() -> str:
    """`describe()` as text for a terminal."""
    facts = describe()
    cpu, cuda, extension = facts["cpu"], facts["cuda"], facts["extension"]
    onednn = "with oneDNN" if cpu["onednn"] else "without oneDNN"
    lines = ["Versions", *_rows(facts["versions"])]
    lines += ["", "Devices", f"  cpu     {cpu['isa']}, {cpu['threads']} threads, torch {onednn}"]
    lines += [f"  cuda:{i}  {_gpu_line(gpu)}" for i, gpu in enumerate(cuda["devices"])]
    if not cuda["devices"]:
        lines.append(f"  cuda    none: {cuda['reason']}")
    lines += ["", "Extension", f"  {_extension_line(extension)}"]
    for device, active in facts["implementations"].items():
        lines += ["", f"Active on {device}", *_rows(active)]
    lines += ["", "Missing, and what it costs", *[f"  - {text}" for text in facts["missing"] or ["nothing"]]]
    return "\n".join(lines)


def _rows(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {name:<{width}}  {text}" for name, text in entries.items()]


def _gpu_line(gpu: dict[str, Any]) -> str:
    major, minor = gpu["compute_capability"]
    return f"{gpu['name']}, sm_{major}{minor}, {gpu['multiprocessors']} SMs, {gpu['memory'] / 2**30:.0f} GiB"


def _extension_line(extension: dict[str, Any]) -> str:
    if not extension["loaded"]:
        return f"not loaded: {extension['reason']}"
    openmp = "torch's OpenMP" if extension["shares_openmp"] else "an OpenMP runtime of its own"
    if not extension["with_openmp"]:
        openmp = "one thread"
    if not extension["with_cuda"]:
        return f"C++ on {openmp}; built without CUDA"
    toolkit = ".".join(map(str, extension["cuda_version"]))
    archs = ", ".join(f"sm_{arch}" for arch in extension["cuda_archs"])
    return f"C++ on {openmp}; CUDA {toolkit} for {archs}, PTX for others"


def _cpu() -> dict[str, Any]:
    extension = _extension.extension
    return {
        "isa": extension.cpu_isa() if extension else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "onednn": torch.backends.mkldnn.is_available(),
    }


def _cuda() -> dict[str, Any]:
    """The devices torch can use, and why there are none."""
    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": found.name,
                "compute_capability": (found.major, found.minor),
                "multiprocessors": found.multi_processor_count,
                "memory": found.total_memory,
                "refusal": _refusal(i, (found.major, found.minor)),
            }
        )
    if devices:
        return {"devices": devices, "reason": ""}
    if torch.version.cuda is None:
        return {"devices": [], "reason": "this torch was built without CUDA"}
    extension = _extension.extension
    known = extension is not None and extension.with_cuda
    return {"devices": [], "reason": extension.cuda_devices()[1] if known else "torch finds no CUDA device"}


def _refusal(index: int, capability: tuple[int, int]) -> str:
    """The reason why a GPU runs no CUDA kernel of ours; "" where it does, or where another line says why."""
    extension = _extension.extension
    known = extension is not None and extension.with_cuda and torch.version.cuda is not None
    return _cuda_support.refusal(index) if known and capability >= (8, 0) else ""


def _describe_extension() -> dict[str, Any]:
    extension = _extension.extension
    if extension is None:
        return {"loaded": False, "reason": _extension.reason}
    return {
        "loaded": True,
        "compiler": extension.compiler,
        "with_openmp": extension.with_openmp,
        "shares_openmp": _shares_openmp(),
        "with_cuda": extension.with_cuda,
        "cuda_version": extension.cuda_version,
        "cuda_archs": extension.cuda_archs,
    }


def _shares_openmp() -> bool:
    """True where a change of torch's thread count reaches the extension, which it does only in one OpenMP runtime."""
    assert _extension.extension is not None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        return bool(_extension.extension.omp_max_threads() == threads + 1)
    finally:
        torch.set_num_threads(threads)


def _on_cpu() -> dict[str, str]:
    convolution = "oneDNN" if torch.backends.mkldnn.is_available() else "PyTorch's own convolution"
    extension = _extension.extension
    if extension is None:
        rows = f"PyTorch rows + {convolution}"
        texts: tuple[str, ...] = ("PyTorch", rows, "PyTorch", f"{rows}, in place", rows, rows, rows)
    else:
        rows = f"C++ rows + {convolution}"
        float32, isa = extension.float32_isa(), extension.bf16_isa()
        direct = [f"{float32} in float32"] if float32 else []
        whole = [*direct, f"{isa} in bfloat16"] if isa else direct
        bottleneck = whole if isa == "AMX" else direct
        texts = (
            "C++",
            f"C++ direct ({direct[0]}), else {rows}" if direct else rows,
            "C++",
            f"C++ direct ({', '.join(whole)}), else {rows}" if whole else rows,
            f"C++ direct ({', '.join(bottleneck)}), else {rows}" if bottleneck else rows,
            f"C++ direct ({direct[0]}), else {rows}" if direct else rows,
            f"C++, one call ({direct[0]}), else {rows}" if direct else rows,
        )
    return dict(zip(_OPS, texts, strict=True))


def _on_cuda(cuda: dict[str, Any]) -> dict[str, str]:
    extension = _extension.extension
    refused = [gpu["refusal"] for gpu in cuda["devices"]]
    in_cuda = extension is not None and extension.with_cuda and (not refused or not all(refused))
    plan = "CUDA, one launch for all blocks" if in_cuda else "PyTorch, without host synchronisation"
    convolutions, edges = "dynamic convolutions, one by one", "dynamic convolutions, edge by edge"
    if find_spec("triton") is None:
        return dict(zip(_OPS, (plan, *["PyTorch, all groups computed and masked"] * 5, edges), strict=True))
    launches = "Triton, two launches and the pass before them"
    block = f"CUDA C++, one launch, where the map fits; else {launches}" if in_cuda else launches
    texts = (plan, "Triton, one launch", "Triton, active instances only", block, convolutions, convolutions, edges)
    return dict(zip(_OPS, texts, strict=True)) | {"tiles": rules.describe()}


def _missing(cuda: dict[str, Any]) -> list[str]:
    texts = []
    extension = _extension.extension
    if extension is None:
        texts.append(
            f"the compiled extension ({_extension.reason}): rows of instances are moved by PyTorch in separate passes, "
            "so less of the saved arithmetic is saved time; install with a C++ compiler"
        )
    elif not extension.float32_isa():
        texts.append(
            "AVX2 on this CPU: the direct kernels do not run, and oneDNN with gather and scatter "
            "was seen 1.1 to 1.5 times slower"
        )
    if extension is not None and not extension.with_cuda:
        texts.append(
            "CUDA sources (no nvcc at build time): nothing on a CPU; on a GPU the plan takes several launches, not one"
        )
    if extension is not None and not extension.with_openmp:
        texts.append("OpenMP in the compiler: the extension computes on one thread")
    elif extension is not None and not _shares_openmp():
        texts.append(
            "a shared OpenMP runtime: the extension's threads and torch's spin against each other, which can slow both "
            "several times; use a torch whose OpenMP is GNU's"
        )
    if not torch.backends.mkldnn.is_available():
        texts.append("oneDNN in this torch: convolutions on a CPU are several times slower")
    if find_spec("triton") is None:
        texts.append(
            "triton: nothing on a CPU; on a GPU every instance computes all groups and unused ones are zeroed, so that "
            "nothing is saved; torch's CUDA builds bring it, else pip install triton"
        )
    for i, gpu in enumerate(cuda["devices"]):
        if gpu["refusal"]:
            texts.append(
                f"the CUDA kernels on cuda:{i}, where they do not run: {gpu['refusal']}; the plan takes several "
                "launches, not one, and a residual block is not fused"
            )
        if tuple(gpu["compute_capability"]) < (8, 0):
            texts.append(f"compute capability 8.0 on cuda:{i}: the GPU kernels do not run there, and nothing is saved")
    return texts
