"""What the compiler makes of the CUDA sources: no warning, no spill, no local memory, registers and shared memory in
bounds, for every architecture that setup.py builds.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.gpu_model import CODE
from den_kernels import _extension
from den_kernels._cuda_layout import FusedArguments, fused_layout

ROOT = Path(__file__).parents[2]
THREADS = {
    **{f"plan_{kind}": 1024 for kind in ("levels_kernelIi", "levels_kernelIl", "masks_kernel")},
    **{f"fused_residual_kernelINS_4{element}": 256 for element in ("Bf16", "Fp16", "Tf32")},
}  # of a block of each kernel, by its name in the object file


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
with_cuda = pytest.mark.skipif(
    _extension.extension is None or not _extension.extension.with_cuda, reason="the extension was built without CUDA"
)
TOOLKIT = getattr(_extension.extension, "cuda_version", None)  # that the extension was built with
BUILT = ("80", "90") if TOOLKIT and TOOLKIT < (12, 8) else SETUP.ARCHS
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="setup.py finds no nvcc")


@needs_nvcc
@pytest.mark.parametrize("source", sorted(path.stem for path in (ROOT / "csrc").glob("*.cu")))
def test_the_compiler_warns_of_nothing(source, tmp_path):
    flags = "-O3 -std=c++17 -DDEN_KERNELS_WITH_CUDA -Werror all-warnings -Xcompiler -Wall,-Werror"
    target = ["-gencode=arch=compute_80,code=compute_80", "-c", ROOT / f"csrc/{source}.cu", "-o", tmp_path / "code.o"]
    done = subprocess.run([NVCC, *flags.split(), *target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def dumped(*options: str) -> str:
    """What cuobjdump says of the extension under test."""
    command = [cuobjdump(), *options, _extension.extension.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> what it takes, by name: registers, bytes of stack and of shared memory, ..."""
    found = {}
    codes = re.findall(r"Fatbin elf code:.*?arch = sm_(\w+)(.*?)(?=Fatbin|\Z)", dumped("-res-usage"), re.DOTALL)
    for arch, text in codes:
        for name, taken in re.findall(r"Function (\w+):\s+(REG:.*)", text):
            found[name, arch] = {kind: int(count) for kind, count in re.findall(r"([A-Z]+):(\d+)", taken)}
    return found


@with_cuda
def test_every_kernel_is_compiled_for_every_architecture(usage):
    for kernel in THREADS:
        assert Counter(arch for name, arch in usage if kernel in name) == dict.fromkeys(BUILT, 1)
    assert len(usage) == len(THREADS) * len(BUILT)


@with_cuda
@pytest.mark.parametrize("arch", BUILT)
@pytest.mark.parametrize("kernel", THREADS)
def test_nothing_is_spilled(usage, kernel, arch):
    """Shared memory is all dynamic; from sm_90 on the system itself takes 1 KB."""
    taken = next(taken for (name, of), taken in usage.items() if kernel in name and of == arch)
    assert (taken["STACK"], taken["LOCAL"]) == (0, 0)
    assert taken["REG"] * THREADS[kernel] <= 65536
    assert taken["SHARED"] <= (1024 if int(arch) >= 90 else 0)


@with_cuda
def test_the_fused_kernel_takes_the_counts_of_the_predictions():
    """In bfloat16 on Hopper (benchmarks/gpu_model.py): products and loads of a step, four pieces activated without a
    load of bn1 or a division, the result loaded four words at a time.
    """
    functions = dumped("-sass", "-arch", "sm_90").split("Function : ")
    kernel = next(part for part in functions if re.match(r"\w*fused_residual\w*Bf16", part))
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", kernel)
    names, places = [name.split(".")[0] for _, name, _ in found], {int(at, 16): i for i, (at, _, _) in enumerate(found)}
    loops = []
    for end, (_, name, operands) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and places.get(int(target[1], 16), end + 1) <= end:
            loops.append(Counter(names[places[int(target[1], 16)] : end + 1]))
    steps = [loop for loop in loops if (loop["HMMA"], loop["LDSM"]) == (CODE.products, CODE.loads)]
    assert min(loop.total() for loop in steps) <= 100
    pieces = [loop for loop in loops if (loop["LDG"], loop["STS"], loop["MUFU"]) == (4, 4, 0)]
    assert min(loop.total() for loop in pieces) <= 180
    last = max(i for i, name in enumerate(names) if name == "HMMA")
    behind = "".join({"LDG": "L", "STG": "S", "BRA": "|"}.get(name, "") for name in names[last:])
    assert len(re.findall("LLLL", behind)) >= 16  # 64 words of a thread


def cuobjdump() -> str:
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    tool = shutil.which("cuobjdump") or (str(beside) if beside.is_file() else None)
    if tool is None:
        pytest.skip("there is no cuobjdump, which CUDA toolkits and triton bring")
    return tool


def listed(kind: str) -> list[str]:
    """The architectures of the pieces of code of a kind, elf or ptx, in the extension under test."""
    return re.findall(r"\.sm_(\w+)\.", dumped(f"--list-{kind}"))


@with_cuda
def test_the_extension_has_code_for_every_architecture_and_ptx_for_the_others():
    """In every source: 8.x, 9.0, 10.x and 12.x find machine code, what comes between and later the PTX of 8.0."""
    sources = len(list((ROOT / "csrc").glob("*.cu")))
    assert Counter(listed("elf")) == dict.fromkeys(BUILT, sources)
    assert Counter(listed("ptx")) == {"80": sources}
    assert _extension.extension.cuda_archs == list(BUILT)


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
