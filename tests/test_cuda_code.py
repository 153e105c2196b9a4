"""What the compiler makes of the CUDA sources: no warning, no spill, no local memory, registers and shared memory in
bounds, for every architecture that setup.py builds.
"""

import importlib.util
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from den_kernels._cuda_layout import FusedProblem, fused_layout

ROOT = Path(__file__).parents[1]
ARCHS = ("80", "90a", "100a")
KERNELS = {
    "plan": {"plan_levels_kernelIi": 1024, "plan_levels_kernelIl": 1024, "plan_masks_kernel": 1024},
    "dynamic_residual": {f"fused_residual_kernelINS_4{element}": 256 for element in ("Bf16", "Fp16", "Tf32")},
}  # their names in the object file, threads of a block


def find_nvcc() -> str | None:
    """Where setup.py finds it, which need not be on PATH."""
    spec = importlib.util.spec_from_file_location("den_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


NVCC = find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="setup.py finds no nvcc")


def compile_(source: str, folder: Path) -> str:
    flags = "-O3 -std=c++17 -DDEN_KERNELS_WITH_CUDA -Werror all-warnings -Xcompiler -Wall,-Werror -Xptxas -v"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    target = ["-c", str(ROOT / f"csrc/{source}.cu"), "-o", str(folder / f"{source}.o")]
    done = subprocess.run([NVCC, *flags.split(), *archs, "-t", "3", *target], capture_output=True, text=True)
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


SHAPES = [
    (16, 32, 16, 1), (16, 32, 64, 1), (32, 32, 32, 1), (64, 32, 64, 1), (64, 32, 128, 2), (128, 32, 128, 1),
    (128, 16, 128, 1), (128, 16, 256, 2), (256, 8, 256, 1), (256, 8, 512, 2), (512, 4, 512, 1), (64, 56, 64, 1),
]  # fmt: skip
CHIPS = {"sm_80": (108, 163 << 10), "sm_90a": (132, 227 << 10)}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("B", [66, 256, 1024])
@pytest.mark.parametrize(("C", "H", "C_out", "stride"), SHAPES)
def test_shared_memory_fits(C, H, C_out, stride, B, itemsize, chip):
    widths = tuple(max(16, C_out * part // 4) for part in (1, 2, 4))
    problem = FusedProblem(B, H, H, C, C_out, widths, stride, itemsize, *CHIPS[chip])
    layout = fused_layout(problem)
    if layout is None:
        assert (chip, itemsize, C, H) == ("sm_80", 4, 128, 16)  # its activations alone take 128 KB
        return
    assert layout.shared(problem) <= problem.shared
    assert layout.blocks <= problem.multiprocessors
