"""The CUDA sources run on a CPU, one fiber per CUDA thread, under address and undefined-behaviour sanitizers.

tests/kernels/shim/cuda_shim.h says what the two schedules bring out. The plan kernels must give the CPU twin's bytes,
the fused residual block the float64 reference's values as nearly as PyTorch would in its dtype.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from den_kernels._cuda_layout import FusedArguments, FusedLayout, fused_layout
from den_kernels.plan import Route, RoutingPlan
from den_kernels.plan_sort import plan_levels as plan_levels_cpu
from den_kernels.plan_sort import plan_levels_reference, plan_masks_reference
from den_kernels.plan_sort import plan_masks as plan_masks_cpu
from den_kernels.testing import assert_as_accurate, make_levels

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.gpu_model import fused_traffic  # noqa: E402

SCHEDULES = ("forward-eager", "backward-lazy")
FLAGS = "-std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all --coverage"
needs_gcov = pytest.mark.skipif(shutil.which("gcov") is None, reason="gcov is not installed")
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas"


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Callable[..., Path]:
    """Compiles tests/kernels/shim/NAME.cpp, once."""

    @cache
    def build(name: str, root: Path = ROOT) -> Path:
        target = tmp_path_factory.mktemp(name) / name
        folders = ["-I", root / "tests/kernels/shim", "-I", root / "csrc"]
        subprocess.run(
            ["g++", *FLAGS.split(), *WARNINGS.split(), *folders, root / f"tests/kernels/shim/{name}.cpp", "-o", target],
            check=True,
        )
        return target

    return build


def run(program: Path, *arguments: object, given: bytes = b"") -> bytes:
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[:2000]
    return done.stdout


def plan(program: Path, kind: str, schedule: str, values: Tensor, sizes: tuple[int, int, int]) -> bytes:
    return run(program, kind, schedule, *sizes, given=values.contiguous().numpy().tobytes())


def as_bytes(tensors: tuple[Tensor, ...]) -> bytes:
    return b"".join(t.numpy().astype(np.int32).tobytes() for t in tensors)


LEVELS = [(0, 3, 4), (1, 1, 1), (5, 2, 3), (31, 3, 32), (33, 1, 4), (1024, 2, 3), (1025, 1, 16), (3001, 2, 255)]


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize(("B", "N", "G"), LEVELS)
def test_levels_give_the_bytes_of_the_cpu_plan(driver, B, N, G, kind):
    levels = torch.randint(0, G + 1, (B, N), dtype=torch.int32 if kind == "int32" else torch.int64)
    expected = as_bytes(plan_levels_cpu(levels, G))
    assert expected == as_bytes(plan_levels_reference(levels, G))
    for schedule in SCHEDULES:
        assert plan(driver("plan_main"), kind, schedule, levels, (B, N, G)) == expected


def test_many_blocks(driver):
    levels = torch.randint(0, 5, (7, 256))
    assert plan(driver("plan_main"), "int64", "forward", levels, (7, 256, 4)) == as_bytes(plan_levels_cpu(levels, 4))


def test_many_instances(driver):
    levels = torch.randint(0, 5, (65536, 1))
    got = plan(driver("plan_main"), "int64", "forward", levels, (65536, 1, 4))
    assert got == as_bytes(plan_levels_cpu(levels, 4))


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_levels_out_of_range_are_clamped(driver, kind):
    wide = torch.int32 if kind == "int32" else torch.int64
    levels = torch.tensor([[-1, 5], [torch.iinfo(wide).max, torch.iinfo(wide).min], [2, 3], [4, 0]], dtype=wide)
    expected = as_bytes(plan_levels_cpu(levels.clamp(0, 3), 3))
    assert plan(driver("plan_main"), kind, "forward", levels, (4, 2, 3)) == expected


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("B", "N", "G"), [(0, 2, 4), (1, 1, 1), (33, 2, 4), (1030, 1, 5), (70, 2, 32), (2100, 1, 3)])
def test_masks_give_the_bytes_of_the_cpu_plan(driver, B, N, G, density):
    masks = torch.rand(B, N, G) < density
    expected = as_bytes(plan_masks_cpu(masks))
    if B < 100:
        assert expected == as_bytes(plan_masks_reference(masks))
    for schedule in SCHEDULES:
        assert plan(driver("plan_main"), "masks", schedule, masks.transpose(0, 1), (B, N, G)) == expected


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}


def rounded(dtype: str, t: Tensor) -> Tensor:
    """t [...] float64 as the kernel's operands hold it."""
    if dtype != "tf32":
        return t.to(DTYPES[dtype]).double()
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


@dataclasses.dataclass
class Block:
    """A residual block, a batch and a layout for it."""

    dtype: str = "bfloat16"
    levels: str | list[int] = "uniform"
    B: int = 5
    C: int = 16
    C_out: int = 16
    size: tuple[int, int] = (8, 8)
    groups: tuple[int, ...] = (16, 32)
    stride: int = 1
    mode: str = "in-place"  # or "add", "shortcut"
    prologue: bool = True
    post: bool = False  # ReLU behind
    bias2: bool = False
    multiprocessors: int = 2
    shared: int = 227 << 10

    def __post_init__(self) -> None:
        self.M = sum(self.groups)
        levels = self.levels
        if isinstance(levels, str):
            levels = make_levels(levels, self.B, len(self.groups)).tolist()
        self.levels = levels
        self.B = len(levels)
        self.route: Route = RoutingPlan.from_levels(torch.tensor(levels, dtype=torch.int64)[:, None], len(self.groups))[
            0
        ]
        self.widths = tuple(accumulate(self.groups))
        generator = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        store = DTYPES[self.dtype]
        self.x = normal(self.B, self.C, *self.size).to(store)
        if self.post:
            self.x.relu_()
        self.conv1 = (normal(self.M, self.C, 3, 3) / (9 * self.C) ** 0.5).to(store)
        self.conv2 = (normal(self.C_out, self.M, 3, 3) / (9 * self.M) ** 0.5).to(store)
        self.scale1, self.shift1, self.scale2, self.bias1, self.bias2_ = (
            normal(n).float() for n in (self.C, self.C, self.M, self.M, self.C_out)
        )

    @property
    def case(self) -> FusedArguments:
        size = 4 if self.dtype == "tf32" else 2
        return FusedArguments(
            self.B, *self.size, self.C, self.C_out, self.widths, self.stride, size, self.multiprocessors, self.shared
        )

    def shortcut(self, x: Tensor | None = None) -> Tensor:  # float64 [B, C_out, Ho, Wo]
        pooled = F.avg_pool2d((self.x if x is None else x).double(), self.stride, ceil_mode=True)
        return F.pad(pooled, (0, 0, 0, 0, 0, self.C_out - self.C))

    def expected(self, keep: Callable[[Tensor], Tensor], magnitude: bool = False) -> Tensor:
        """The block in float64, operands through `keep`; or the size of the terms that are added up."""
        size = torch.abs if magnitude else torch.clone
        out = self.shortcut(size(self.x))
        for b, level in enumerate(self.levels):
            if level == 0:
                continue
            width = self.widths[level - 1]
            a = self.x[b : b + 1].double()
            if self.prologue:
                a = (a * self.scale1[:, None, None] + self.shift1[:, None, None]).relu()
            conv1, conv2 = size(keep(self.conv1.double()[:width])), size(keep(self.conv2.double()[:, :width]))
            h = F.conv2d(size(keep(a)), conv1, None, self.stride, 1)
            h = size(self.scale2[:width, None, None]) * h + size(self.bias1[:width, None, None])
            y = F.conv2d(keep(h.relu()), conv2, None, 1, 1)[0]
            out[b] += y + size(self.bias2_[:, None, None]) * self.bias2
        return out.relu() if self.post else out

    def run(self, program: Path, schedule: str = "forward-eager", layout: FusedLayout | None = None):
        """(out [B, C_out, Ho, Wo], int64: bytes streamed, loaded, stored, of shared memory)."""
        layout = layout or fused_layout(self.case)
        assert layout is not None
        H, W = self.size
        Ho, Wo = -(-H // self.stride), -(-W // self.stride)
        flags = [self.post, self.prologue, self.bias2]
        sizes = [self.B, H, W, self.C, Ho, Wo, self.C_out, self.M, self.stride, len(self.groups), *map(int, flags)]
        arrays = [self.x.permute(0, 2, 3, 1)]
        if self.mode == "add":
            arrays.append(self.shortcut().to(self.x.dtype).permute(0, 2, 3, 1))
        arrays += [self.route.order, self.route.offsets]
        arrays += [self.conv1.permute(0, 2, 3, 1), self.conv2.permute(0, 2, 3, 1), self.scale2, self.bias1]
        arrays += [self.scale1, self.shift1] * self.prologue + [self.bias2_] * self.bias2
        given = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in arrays if t.numel())
        done = np.frombuffer(
            run(program, self.dtype, schedule, self.mode, *sizes, *layout, 0, *self.widths, given=given), np.uint8
        ).copy()
        out = torch.from_numpy(done[:-32]).view(self.x.dtype).view(self.B, Ho, Wo, self.C_out).permute(0, 3, 1, 2)
        counters = done[-32:].view(np.int64)
        return out, counters


def assert_right(block: Block, out: Tensor) -> None:
    keep = partial(rounded, block.dtype)
    peer = block.expected(keep).to(out.dtype)
    assert_as_accurate(out, peer, block.expected(torch.clone), block.expected(torch.clone, magnitude=True))


BLOCKS = {
    "levels mixed": {"levels": [2, 0, 1, 2, 1]},
    "batch odd": {"levels": [2, 2, 1, 1, 1, 0, 2]},
    "all at level 0": {"levels": "zero"},
    "all at the top": {"levels": "top"},
    "last only": {"levels": "last only"},
    "one instance": {"levels": [1], "multiprocessors": 1},
    "one group": {"levels": [1, 0, 1], "groups": (48,)},
    "a narrow group": {"levels": [1, 2, 3], "groups": (16, 16, 80), "multiprocessors": 1},
    "map smaller than a fragment": {"size": (3, 3), "B": 9, "multiprocessors": 1},
    "map 7 x 7": {"size": (7, 7), "C": 32, "C_out": 32},
    "bands": {"size": (40, 16), "levels": [1, 2], "multiprocessors": 1},
    "bands, last of one row": {"size": (15, 32), "levels": [2, 0, 1]},
    "bands, little shared memory": {"size": (12, 20), "levels": [1, 2], "shared": 34 << 10},
    "wide map, bands of few rows": {"size": (9, 60), "levels": [1], "shared": 72 << 10, "multiprocessors": 1},
    "short steps of weights": {"C": 48, "C_out": 48, "size": (4, 4), "shared": 28 << 10},
    "512 channels": {"C": 16, "C_out": 512, "size": (4, 4), "mode": "shortcut", "levels": [1, 0, 2]},
    "512 channels in": {"C": 512, "C_out": 512, "size": (2, 2), "levels": [1], "groups": (16,), "multiprocessors": 1},
    "2 columns": {"C": 16, "C_out": 128, "size": (16, 16), "mode": "add", "levels": [0, 1]},
    "4 columns": {"C": 16, "C_out": 192, "size": (8, 8), "mode": "add", "levels": [0, 1, 2, 2, 1]},
    "wide slices": {"C": 16, "C_out": 256, "size": (8, 8), "mode": "add", "groups": (64, 80), "levels": [2, 1]},
    "functional": {"mode": "shortcut"},
    "more channels": {"mode": "shortcut", "C_out": 48},
    "stride 2": {"mode": "shortcut", "stride": 2, "C_out": 32, "size": (16, 16)},
    "stride 2, odd map": {"mode": "shortcut", "stride": 2, "C_out": 32, "size": (9, 7)},
    "stride 2, bands": {"mode": "shortcut", "stride": 2, "size": (37, 60), "levels": [2, 0], "multiprocessors": 1},
    "stride 2, shortcut given": {"mode": "add", "stride": 2, "C_out": 32},
    "no prologue": {"prologue": False, "bias2": True},
    "post-activation": {"prologue": False, "post": True, "bias2": True},
    "post-activation, stride 2": {"prologue": False, "post": True, "stride": 2, "C_out": 32, "mode": "shortcut"},
}


# Of other dtypes than bfloat16, which differ in the products alone, those with another number of fragments or of pairs.
IN_EVERY_DTYPE = (
    "levels mixed",
    "stride 2, bands",
    "2 columns",
    "wide slices",
    "short steps of weights",
    "post-activation",
)
OF_BLOCKS = [
    pytest.param(name, dtype, marks=() if dtype == "bfloat16" or name in IN_EVERY_DTYPE else pytest.mark.release)
    for name, dtype in product(BLOCKS, DTYPES)
]


@pytest.mark.parametrize(("name", "dtype"), OF_BLOCKS)
def test_blocks_give_the_reference_values(driver, name, dtype):
    block = Block(dtype=dtype, **BLOCKS[name])
    for schedule in SCHEDULES if dtype == "bfloat16" else SCHEDULES[1:]:
        out, _ = block.run(driver("residual_main"), schedule)
        assert_right(block, out)
        if block.mode == "in-place":
            still = torch.tensor(block.levels) == 0
            assert torch.equal(out[still], block.x[still])


def never_run(program: Path, cases: Callable[[], None], name: str) -> list[str]:
    """The functions of csrc in a program, each instance of a template by itself, that none of the cases runs.

    Raises AssertionError unless one of `name` is among all.
    """
    for counts in program.parent.glob("*.gcda"):
        counts.unlink()
    cases()
    notes = next(program.parent.glob("*.gcno")).name
    done = subprocess.run(["gcov", "--json-format", "--stdout", notes], cwd=program.parent, capture_output=True)
    files = [file for file in json.loads(done.stdout)["files"] if "csrc/" in file["file"]]
    ran = {f["demangled_name"]: f["execution_count"] for file in files for f in file["functions"]}
    assert any(name in instance for instance in ran)
    return [instance for instance, times in ran.items() if not times]


@needs_gcov
def test_cases_run_every_instance_of_the_block(driver):
    """The kernel chooses among five `multiply` a dtype by the fragments and pairs of a warp: all and some in conv1; all
    of both, half of the pairs, and some in conv2."""
    program = driver("residual_main")

    def cases() -> None:
        for dtype, name in product(DTYPES, ("stride 2, bands", "2 columns", "wide slices", "short steps of weights")):
            Block(dtype=dtype, **BLOCKS[name]).run(program)

    assert never_run(program, cases, "multiply<den_kernels::Tf32, 4, 2, false, 4, 8>") == []


@needs_gcov
def test_cases_run_every_instance_of_the_plan(driver):
    program = driver("plan_main")

    def cases() -> None:
        for kind, dtype in (("int32", torch.int32), ("int64", torch.int64), ("masks", torch.bool)):
            plan(program, kind, "forward", torch.ones((2, 33, 4) if kind == "masks" else (33, 2)).to(dtype), (33, 2, 4))

    assert never_run(program, cases, "plan_levels_kernel<long") == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_instance(driver, dtype):
    layout = fused_layout(Block(dtype=dtype).case)
    out, counters = Block(dtype=dtype, levels=[]).run(driver("residual_main"), layout=layout)
    assert out.numel() == 0
    assert counters[:3].tolist() == [0, 0, 0]


def test_every_number_of_blocks_gives_the_same_bits(driver):
    block = Block(levels=[2, 1, 0, 2, 2, 1, 1], size=(4, 4))
    layout = fused_layout(block.case)
    first, _ = block.run(driver("residual_main"))
    for blocks in (1, 3, 40):
        again, _ = block.run(driver("residual_main"), layout=layout._replace(blocks=blocks))
        assert torch.equal(again, first)


FAULTS = {
    "weights that are not waited for": ("fused_weights.cuh", "copy_async_wait<kFusedStages - 2>();", ""),
    "padding before the activation": ("fused_multiply.cuh", "(y > 0 ? 0007u : 0)", "0007u"),
}


@pytest.mark.release  # each compiles the block
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(driver, fault, tmp_path):
    file, right, wrong = FAULTS[fault]
    for name in ("csrc", "tests/kernels/shim"):
        shutil.copytree(ROOT / name, tmp_path / name)
    source = tmp_path / "csrc" / file
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    program = driver("residual_main", tmp_path)
    block = Block(levels=[1, 2], size=(40, 16), multiprocessors=1)
    with pytest.raises(AssertionError):
        assert_right(block, block.run(program, "backward-lazy")[0])


@pytest.mark.parametrize("name", ["levels mixed", "bands, last of one row", "stride 2, bands", "512 channels"])
def test_traffic(driver, name):
    """Bytes of the maps come but once: the schedule reads x for the activations, and reads and writes what it adds to.
    Weights stream once for each tile and band, at the instance's width."""
    block = Block(**BLOCKS[name])
    layout = fused_layout(block.case)
    _, (streamed, loaded, stored, shared) = block.run(driver("residual_main"))
    assert shared == layout.shared(block.case)
    model = fused_traffic(block.case, [block.levels.count(level) for level in range(len(block.groups) + 1)])
    assert streamed == model.streamed
    Ho, Wo = (-(-side // block.stride) for side in block.size)
    map_in, map_out = 2 * block.C * block.size[0] * block.size[1], 2 * block.C_out * Ho * Wo
    writes = block.mode == "shortcut"
    assert loaded == model.loaded + writes * block.B * map_in
    assert stored == model.stored + writes * block.B * map_out


def test_a_block_is_worth_fusing_where_pixels_share_the_weights():
    for B, H, worth in ((256, 8, False), (1024, 8, True), (256, 4, False), (1024, 4, False), (256, 16, True)):
        case = FusedArguments(B, H, H, 256, 256, (64, 128, 256), 1, 2, 132, 227 << 10)
        layout = fused_layout(case)
        assert layout is not None
        assert layout.is_worth(case) == worth


def test_layouts_of_known_networks():
    """Rules of the choice: maps share a read of the weights as long as every multiprocessor has some; else bands."""

    def layout(B: int, C: int, H: int, C_out: int, stride: int = 1, itemsize: int = 2) -> tuple[int, ...] | None:
        widths = (C_out // 4, C_out // 2, C_out)
        made = fused_layout(FusedArguments(B, H, H, C, C_out, widths, stride, itemsize, 132, 227 << 10))
        return made and made[:4]  # instances, rows, columns, hidden columns

    assert layout(256, 64, 32, 64) == (1, 14, 1, 1)
    assert layout(256, 128, 16, 128) == (1, 16, 2, 2)
    assert layout(256, 256, 8, 256) == (1, 8, 8, 4)
    assert layout(1024, 256, 8, 256) == (2, 8, 4, 4)
    assert layout(256, 64, 32, 128, stride=2) == (1, 16, 2, 2)
    assert layout(1024, 512, 4, 512) == (4, 4, 8, 8)
    assert layout(256, 256, 8, 256, itemsize=4) == (1, 8, 8, 4)
    assert layout(65, 64, 32, 64) is None  # half of the multiprocessors would stand idle
    assert layout(256, 8, 32, 64) is None  # not whole steps of 16 channels
    assert layout(256, 64, 600, 64) is None  # one band needs more than 512 pixels
