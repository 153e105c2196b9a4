"""The machine code of the GPU kernels, compiled ahead of time: no GPU is needed.

Asserted for every shipped launch: tensor core instructions of the architecture, asynchronous 128-bit copies, shared
memory that fits and holds the planned stages, no spilled register and no local memory.
"""

import re
import subprocess
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from den_kernels._conv_cpu import Geometry
from den_kernels.plan import Route

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from den_kernels._triton import norm  # noqa: E402
from den_kernels._triton.convolve import Epilogue, convolution_launch  # noqa: E402
from den_kernels._triton.launch import Launch  # noqa: E402
from den_kernels._triton.weight_gradient import weight_gradient_launch  # noqa: E402

pytestmark = pytest.mark.slow
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
POINTERS |= {torch.uint8: "*u8"}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
BATCH = 256


class Code(NamedTuple):
    registers: int
    stack: int  # bytes: spilled registers and local arrays
    shared: int  # bytes
    instructions: Counter


def compile_launch(launch: Launch, arch: int) -> Code:
    """Compile what a launch would run on an architecture, and take the result apart."""
    arguments = {"num_stages": 1} | launch.arguments
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return disassemble(compiled)


def disassemble(compiled) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(TOOLS / "cuobjdump"), "-res-usage", str(cubin))
        listing = run(str(TOOLS / "nvdisasm"), "-c", str(cubin))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE))
    return Code(registers, stack, compiled.metadata.shared, instructions)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.empty(*shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def a_launch(
    kind: str, width: int, dtype: torch.dtype, arch: int, stride: int = 1, cardinality: int = 1, masked: bool = False
) -> Launch:
    """A launch of a residual block of `width` channels, as WRN-32-4 (64, 128, 256) has them; meta tensors."""
    size = max(4, 2048 // width) if width >= 64 else 32
    groups = (width // 4, width // 4, width // 2)
    indices = lambda n: torch.empty(n, dtype=torch.int32, device="meta")  # noqa: E731
    mask = torch.empty(BATCH, 3, dtype=torch.bool, device="meta") if masked else None
    route = Route(indices(BATCH), indices(BATCH), indices(5), 3, mask)
    pair, first = (stride, stride), kind.startswith("conv1")
    out_groups, in_groups = (groups, ()) if first else ((), groups)
    if cardinality > 1:
        out_groups = in_groups = groups
    geometry = Geometry(pair, (1, 1), (1, 1), cardinality, out_groups, in_groups)
    x = empty(BATCH, width, size, size, dtype=dtype)
    y = empty(BATCH, width, -(-size // stride), -(-size // stride), dtype=dtype)
    weight = empty(width, width // cardinality, 3, 3, dtype=dtype)
    vector = empty(width, dtype=torch.float32)
    if kind.endswith("weight"):
        return weight_gradient_launch(y, x, (3, 3), route, geometry, arch, 132)
    epilogue, inference = Epilogue(), not kind.endswith("data")
    if kind == "conv1 block":
        epilogue = Epilogue(vector, vector, relu=True)
    elif kind == "conv2 block":
        epilogue = Epilogue(add=True)
    elif kind.endswith("data"):
        x, y = y, x
    block = kind.endswith("block")
    return convolution_launch(x, weight, y, route, geometry, not inference, block, epilogue, arch, 132)


KINDS = ("conv1 block", "conv2 block", "conv1 data", "conv2 data", "conv1 weight", "conv2 weight")
HALF, FULL = torch.bfloat16, torch.float32
WIDTHS = (16, 32, 64, 128, 256, 512)
CASES = [
    *product(KINDS, WIDTHS, (HALF,), (80, 90, 100)),
    *product(KINDS, WIDTHS, (FULL,), (80, 90, 100)),
    *product(("conv1 block", "conv2 block"), (256,), (torch.float16,), (90,)),
]


def planned_bytes(launch: Launch, kind: str, arch: int) -> int:
    """Shared memory of the stages that are on their way at a time.

    Operands that pass through registers save a stage: before Hopper, and in narrow weight gradients. In all weight
    gradients two stages go by before a load, because the instance and its pixels are loaded ahead of it.
    """
    a = launch.arguments
    narrow = kind.endswith("weight") and a["BN"] < 64
    stages = a["num_stages"] - (arch < 90 or narrow) - 2 * kind.endswith("weight")
    rungs = [(a["BM"], bn, bk) for bn, bk in zip(a["BNS"], a["BKS"], strict=True)] if "BNS" in a else []
    steps = [(bm + bn) * bk for bm, bn, bk in rungs] or [a["BP"] * (a["BN"] + a["BK"])]
    return stages * max(steps) * a["source"].dtype.itemsize


def assert_nothing_spilled(code: Code) -> None:
    assert code.stack == 0, f"{code.stack} bytes spilled at {code.registers} registers"
    assert not re.search(r"\b(LDL|STL)", " ".join(code.instructions))


def check(launch: Launch, kind: str, width: int, dtype: torch.dtype, arch: int) -> None:
    code = compile_launch(launch, arch)
    names = " ".join(code.instructions)
    assert_nothing_spilled(code)
    assert planned_bytes(launch, kind, arch) <= code.shared <= SHARED[arch]
    # A warp group multiplies 64 rows at a time; tiles of fewer take the instruction of a warp.
    narrow = kind.endswith("weight") and width < 64
    assert re.search(rf"\b{'HMMA' if narrow else TENSOR_CORES[arch]}\b", names), names
    # Loads end at a group: one of fewer than 16 bytes gives narrower ones. And wgmma takes TF32 only with neighbouring
    # elements of the reduction next to each other, which are pixels here: such copies are one element wide.
    turned = kind.endswith("weight") and dtype == torch.float32 and arch >= 90 and not narrow
    wide = width // 4 * dtype.itemsize >= 16 and not turned
    assert not wide or re.search(r"\bLDGSTS\.\S*128", names), names


@pytest.mark.parametrize(("kind", "width", "dtype", "arch"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_shipped_launches(kind, width, dtype, arch):
    check(a_launch(kind, width, dtype, arch), kind, width, dtype, arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", ["conv1 block", "conv1 data", "conv1 weight"])
def test_the_first_convolution_of_a_stage(kind, arch):
    """It halves the map: in its data gradient every second tap meets a pixel."""
    check(a_launch(kind, 128, HALF, arch, stride=2), kind, 128, HALF, arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_spill_nothing(kind, arch):
    code = compile_launch(a_launch(kind, 128, HALF, arch, masked=True), arch)
    assert_nothing_spilled(code)
    assert re.search(rf"\b({'|'.join(TENSOR_CORES.values())})\b", " ".join(code.instructions))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_without_tf32_no_tensor_core_multiplies_float32(kind, arch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for width in WIDTHS:
        code = compile_launch(a_launch(kind, width, FULL, arch), arch)
        names = " ".join(code.instructions)
        assert "FFMA" in names
        assert not re.search(rf"\b({'|'.join(TENSOR_CORES.values())})\b", names), names
        assert_nothing_spilled(code)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("cardinality", "width"), [(8, 512), (4, 256), (2, 128)])
def test_cardinality_as_resnext_29_has_it(cardinality, width, arch):
    """Groups of 64 channels, elastic on both sides."""
    for kind in ("conv1", "conv1 data", "conv1 weight"):
        check(a_launch(kind, width, HALF, arch, cardinality=cardinality), kind, width, HALF, arch)


def norm_launches(width: int, dtype: torch.dtype) -> dict[str, Launch]:
    size, groups = max(4, 2048 // width), (width // 4, width // 4, width // 2)
    x, selection = empty(BATCH, width, size, size, dtype=dtype), empty(BATCH, 3, dtype=torch.bool)
    vector, statistics = empty(width, dtype=torch.float32), empty(3, width, dtype=torch.float32)
    affine = norm.Affine(statistics, vector, vector, 1e-5, True)
    first = norm.statistics_launch(x, selection, groups, 132)
    return {
        "statistics": first,
        "fold": norm.fold_launch(first.arguments["partial"], statistics),
        "apply": norm.apply_launch(x, x, selection, affine, groups, 132),
        "reduce": norm.reduce_launch(x, x, selection, affine, groups, 132),
        "gradient": norm.gradient_launch(x, x, x, selection, affine, empty(2, width, dtype=torch.float32), groups, 132),
    }


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("width", "dtype"), [(64, HALF), (256, HALF), (64, FULL)], ids=str)
def test_passes_of_the_batch_norm_read_128_bits_and_spill_nothing(width, dtype, arch):
    for name, launch in norm_launches(width, dtype).items():
        code = compile_launch(launch, arch)
        assert_nothing_spilled(code)
        assert name == "fold" or code.instructions["LDG.E.128"], (name, code.instructions)
