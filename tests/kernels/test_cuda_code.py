"""What the compiler makes of the CUDA sources: no warning, no spill, no local memory, registers and shared memory in
bounds, for every architecture that setup.py builds.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from den_kernels import _extension
from den_kernels._cuda_layout import FusedArguments, fused_layout

ROOT = Path(__file__).parents[2]
KERNELS = {
    "plan": {"plan_levels_kernelIi": 1024, "plan_levels_kernelIl": 1024, "plan_masks_kernel": 1024},
    "dynamic_residual": {f"fused_residual_kernelINS_4{element}": 256 for element in ("Bf16", "Fp16", "Tf32")},
}  # their names in the object file, threads of a block


def load_setup() -> ModuleType:
    """setup.py."""
    spec = importlib.util.spec_from_file_location("den_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
NVCC = SETUP.find_nvcc()  # which need not be on PATH
KNOWN = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split() if NVCC else []
ARCHS = [arch for arch in SETUP.ARCHS if f"compute_{arch}" in KNOWN]
with_cuda = pytest.mark.skipif(
    _extension.extension is None or not _extension.extension.with_cuda, reason="the extension was built without CUDA"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="setup.py finds no nvcc")


def compile_(source: str, folder: Path) -> str:
    flags = "-O3 -std=c++17 -DDEN_KERNELS_WITH_CUDA -Werror all-warnings -Xcompiler -Wall,-Werror -Xptxas -v"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    target = ["-c", str(ROOT / f"csrc/{source}.cu"), "-o", str(folder / f"{source}.o")]
    done = subprocess.run([NVCC, *flags.split(), *archs, "-t", "4", *target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(lambda source: compile_(source, folder), KERNELS), strict=True))


def entries(report: str) -> dict[tuple[str, str], str]:
    """(kernel, architecture) -> what ptxas says of it."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", report)[1:]
    return {(name, arch): text for name, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS)
def test_every_kernel_is_compiled_for_every_architecture(reports, source):
    found = entries(reports[source])
    assert len(found) == len(KERNELS[source]) * len(ARCHS)
    for kernel in KERNELS[source]:
        assert {arch for name, arch in found if kernel in name} == set(ARCHS)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("source", "kernel"), [(source, kernel) for source in KERNELS for kernel in KERNELS[source]])
def test_nothing_is_spilled(reports, source, kernel, arch):
    text = next(text for (name, of), text in entries(reports[source]).items() if kernel in name and of == arch)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert frame is not None, text
    assert registers is not None, text
    assert frame.groups() == ("0", "0", "0"), text
    assert int(registers[1]) * KERNELS[source][kernel] <= 65536
    static = re.search(r"(\d+) bytes smem", text)
    assert static is None, "shared memory is all dynamic"


def listed(kind: str) -> list[str]:
    """The architectures of the pieces of code of a kind, elf or ptx, in the extension under test."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    tool = shutil.which("cuobjdump") or (str(beside) if beside.is_file() else None)
    if tool is None:
        pytest.skip("there is no cuobjdump, which CUDA toolkits and triton bring")
    command = [tool, f"--list-{kind}", _extension.extension.__file__]
    return re.findall(r"\.sm_(\w+)\.", subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@with_cuda
def test_the_extension_has_code_for_every_architecture_and_ptx_for_the_others():
    """In every source: 8.x, 9.0, 10.x and 12.x find machine code, what comes between and later the PTX of 8.0."""
    sources = len(list((ROOT / "csrc").glob("*.cu")))
    wanted = SETUP.ARCHS if _extension.extension.cuda_version >= (12, 8) else ("80", "90")
    assert Counter(listed("elf")) == dict.fromkeys(wanted, sources)
    assert Counter(listed("ptx")) == {"80": sources}
    assert _extension.extension.cuda_archs == list(wanted)


def test_no_architecture_is_bound_to_one_chip():
    """sm_90a or sm_100f would not run on later chips of the same major version."""
    assert all(arch.isdecimal() for arch in SETUP.ARCHS)


SHAPES = [
    (16, 32, 16, 1), (16, 32, 64, 1), (32, 32, 32, 1), (64, 32, 64, 1), (64, 32, 128, 2), (128, 32, 128, 1),
    (128, 16, 128, 1), (128, 16, 256, 2), (256, 8, 256, 1), (256, 8, 512, 2), (512, 4, 512, 1), (64, 56, 64, 1),
]  # fmt: skip
CHIPS = {"sm_80": (108, 163 << 10), "sm_90": (132, 227 << 10)}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("B", [66, 256, 1024])
@pytest.mark.parametrize(("C", "H", "C_out", "stride"), SHAPES)
def test_shared_memory_fits(C, H, C_out, stride, B, itemsize, chip):
    widths = tuple(max(16, C_out * part // 4) for part in (1, 2, 4))
    case = FusedArguments(B, H, H, C, C_out, widths, stride, itemsize, *CHIPS[chip])
    layout = fused_layout(case)
    if layout is None:
        assert (chip, itemsize, C, H) == ("sm_80", 4, 128, 16)  # its activations alone take 128 KB
        return
    assert layout.shared(case) <= case.shared
    assert layout.blocks <= case.multiprocessors
