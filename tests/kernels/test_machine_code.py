"""The machine code of the GPU kernels, compiled ahead of time: no GPU is needed.

For every launch that a network makes: tensor core instructions of the architecture, asynchronous 128-bit copies, shared
memory that fits and holds the planned stages, no spilled register and no local memory; on Hopper no register of a
matrix instruction in flight is touched, none of these takes an operand from registers, and convolutions on strips and
boxes are loaded by the copy engine in few issue slots.

    pytest tests/kernels/test_machine_code.py                      a choice of launches, in the installed Triton
    pytest tests/kernels/test_machine_code.py -k wrn32_4           the launches of WRN-32-4 (scripts/machine_code.sh)
    pytest tests/kernels/test_machine_code.py --every-launch       every network in every dtype (half an hour)
"""

import re
from collections.abc import Collection
from importlib.metadata import version
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gpu_model import SLOTS, STRIP, Slots
from den_kernels._triton.launch import Launch
from tests.launches import Code, block_kinds, compile_launch, describe, identity, launches_of, product_loops
from tests.wgmma_hazards import find, products_with_a_in_registers

pytestmark = pytest.mark.slow
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
ANY_TENSOR_CORE = re.compile(rf"\b({'|'.join(TENSOR_CORES.values())})\b")
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # of a block; the tiles of 8.0 run on 8.6, 8.9 and 12.0 too
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
WIDE_TILE = 1920  # issue slots around the loop of a convolution to more than 256 channels
NETWORKS = ("wrn32_4", "resnet42", "resnext29_8x64d")

# Network, numbers, architecture, masks; and which of its kinds of blocks are compiled in every run (of TF32 and masks
# those that compile quickly), all others with --every-launch.
IN_EVERY_RUN: dict[tuple, Collection[int]] = {
    ("wrn32_4", "bf16", 90, False): range(6),
    ("wrn32_4", "bf16", 80, False): (1, 4),
    ("wrn32_4", "bf16", 90, True): (1,),
    ("wrn32_4", "tf32", 90, False): (5,),
    ("resnext29_8x64d", "bf16", 90, False): (3,),
}
CASES = [*product(NETWORKS, DTYPES, (90,), (False, True)), *product(NETWORKS, DTYPES, (80, 100), (False,))]
CASES += [("wrn14_1", "bf16", 90, False)]  # narrow


def cases() -> list:
    """One for each kind of block, so that processes share the work."""
    found = []
    for case in CASES:
        network, numbers, arch, masked = case
        for block in range(len(block_kinds(network))):
            marks = () if block in IN_EVERY_RUN.get(case, ()) else pytest.mark.every_launch
            name = f"{network}-{numbers}-sm_{arch}-{'masks' if masked else 'levels'}-{block}"
            found.append(pytest.param(network, numbers, arch, masked, block, id=name, marks=marks))
    return found


def most_steps(launch: Launch) -> int:
    """Of a convolution's longest loop."""
    a = launch.arguments
    return a["R"] * a["S"] * -(-a["KC"] // a["CARDINALITY"] // max(a["BKS"]))


def planned_bytes(launch: Launch, arch: int) -> int:
    """Shared memory of the steps that are on their way at a time.

    Before Hopper, and without tensor cores, a step is on its way in registers. In a weight gradient two stages go by
    before a load, because the instance is loaded ahead of it; a narrow one takes the instruction of a warp, whose
    operands pass through registers.
    """
    a = launch.arguments
    weight = "BP" in a
    ieee = a["PRECISION"] == "ieee" and a["source"].dtype == torch.float32
    stages = a["num_stages"] - (arch < 90 or ieee or (weight and a["BN"] < 64)) - 2 * weight
    if weight:
        return stages * a["BP"] * (a["BN"] + a["BK"]) * a["source"].dtype.itemsize
    steps = most_steps(launch)
    widest = max((a["BM"] + bn) * bk for bn, bk in zip(a["BNS"], a["BKS"], strict=True))
    return min(stages, steps) * widest * a["source"].dtype.itemsize


def is_forward(launch: Launch) -> bool:
    """True for a convolution of one cardinality group that is no gradient and takes more than one step."""
    a = launch.arguments
    return not a.get("TRANSPOSED", True) and a["CARDINALITY"] == 1 and most_steps(launch) > 1


def assert_sound(code: Code, arch: int) -> None:
    """What holds for every kernel."""
    assert code.stack == 0, f"{code.stack} bytes spilled at {code.registers} registers"
    assert not re.search(r"\b(LDL|STL)", code.names)
    assert code.shared <= SHARED[arch]
    if arch == 90:
        assert find(code.listing) == []
        assert products_with_a_in_registers(code.listing) == 0


def assert_multiplies(launch: Launch, code: Code, arch: int) -> None:
    """What holds for a convolution or a weight gradient: planned stages, wide copies, and tensor cores."""
    a = launch.arguments
    if not a.get("MASKED") and not a.get("LISTS"):
        assert planned_bytes(launch, arch) <= code.shared
    if a["PRECISION"] == "ieee" and a["source"].dtype == torch.float32:
        assert "FFMA" in code.names
        assert not ANY_TENSOR_CORE.search(code.names), code.names
        return
    # A warp group multiplies 64 rows at a time; tiles of fewer take the instruction of a warp.
    narrow = "BP" in a and a["BN"] < 64
    assert re.search(rf"\b{'HMMA' if narrow else TENSOR_CORES[arch]}\b", code.names), code.names
    # Loads end at a group: one of fewer than 16 bytes gives narrower ones. And wgmma takes TF32 only with neighbouring
    # elements of the reduction next to each other, which are pixels here: such copies are one element wide.
    turned = "BP" in a and a["source"].dtype == torch.float32 and arch >= 90 and not narrow
    wide = min(a["NC"], a["KC"]) // 4 * a["source"].dtype.itemsize >= 16 and not turned
    once = "BKS" in a and most_steps(launch) == 1  # nothing to overlap with
    assert not wide or once or re.search(r"\bLDGSTS\.\S*128", code.names), code.names


def assert_slots(launch: Launch, code: Code, most: Slots) -> None:
    """The issue slots of a turn, and of all else for each rung, are at most what is predicted with.

    Where a tile is one turn, the loop over tiles holds both. A pooled shortcut, of two blocks in a network, is not in
    the prediction, which counts what Triton 3.6 makes; other releases are within a hundredth. Maps of more channels
    than WRN-32-4 has, which it does not predict, take more around the loop.
    """
    a, loops = launch.arguments, product_loops(code)
    if not version("triton").startswith("3.6."):
        most = Slots(round(most.turn * 1.01), round(most.tile * 1.01))
    if a["NC"] > 256:
        most = most._replace(tile=WIDE_TILE)
    area = sum(a["BM"] * bn for bn in a["BNS"]) / (128 * 64)
    if "boxes_0" in a and a["R"] * a["S"] * max(a["K_WIDTHS"]) <= max(a["BKS"]):
        assert max(loop.slots for loop in loops) <= most.turn + most.tile * max(area, 1), loops
        return
    assert max(loop.slots for loop in loops) <= most.turn, loops
    around = code.instructions.total() - sum(loop.slots for loop in loops)
    assert a["POOL"] or around <= most.tile * max(area, len(loops)), (around, area)


def assert_loads_boxes(launch: Launch, code: Code, arch: int) -> None:
    """What holds for a convolution on boxes: the copy engine loads, operands stay in shared memory, few slots a turn.

    A turn is one tap of 64 channels at most. The counts are those of the predictions (benchmarks/gpu_model.py). As many
    programs as the launch puts on a multiprocessor fit it. Where a tile is one turn, the loop over tiles is pipelined
    instead, and the number of an instance is copied ahead of it: 4 bytes.
    """
    a = launch.arguments
    assert "UTMALDG.4D" in code.names, code.names
    assert not re.search(r"\b(LDGSTS\S*(64|128)|LDSM)", code.names), code.names
    assert re.search(rf"\b{TENSOR_CORES[arch]}\b", code.names), code.names
    if arch != 90:
        return
    loops = product_loops(code)
    assert len(loops) == len(a["BKS"])
    assert_slots(launch, code, SLOTS["boxes"])
    programs = -(-launch.programs // 132)
    assert programs * 128 * -(-code.registers // 8) * 8 <= 1 << 16
    assert programs * (code.shared + 1024) <= 228 << 10


def assert_on_strips(launch: Launch, code: Code) -> None:
    """What holds for a convolution on strips: the copy engine loads, products of a stage in few slots, and all fit.

    All warps that multiply meet between the end of a stage's products and its return to the loading warp. The launch
    also holds the four warps among which the loading one is.
    """
    a, loops = launch.arguments, product_loops(code)
    assert "UTMALDG.4D" in code.names, code.names
    assert not re.search(r"\bLDGSTS", code.names), code.names
    products = [a["ROWS"] * a["R"] * bk // 16 for bk in a["BKS"]]
    assert sorted(len(loop.products) for loop in loops) == sorted(products), loops
    assert max(loop.slots for loop in loops) <= STRIP.turn, loops
    around = code.instructions.total() - sum(loop.slots for loop in loops)
    most = STRIP.tile * max(sum(set(a["BNS"])) / 64, 1)
    assert around <= most * (1 if version("triton").startswith("3.6.") else 1.05), around
    order = re.findall(r"HGMMA|WARPGROUP\.DEPBAR|BAR\.SYNC|SYNCS\.ARRIVE\S*A1T0", code.listing)
    given_back = [i for i, name in enumerate(order) if name.startswith("SYNCS")]
    assert len(given_back) == len(loops)
    for i in given_back:
        last = max(j for j in range(i) if order[j] == "HGMMA")
        assert order[last + 1] == "WARPGROUP.DEPBAR", order
        assert set(order[last + 2 : i]) == {"BAR.SYNC"}, order
    programs, threads = -(-launch.programs // 132), 32 * (a["num_warps"] + 4)
    assert programs * threads * -(-code.registers // 8) * 8 <= 1 << 16
    assert programs * (code.shared + 1024) <= 228 << 10


_seen: set[tuple] = set()


@pytest.mark.parametrize(("network", "numbers", "arch", "masked", "block"), cases())
def test_launches(network, numbers, arch, masked, block, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", numbers != "ieee")
    launches = launches_of(network, DTYPES[numbers], arch, masked, block)
    assert len(launches) >= 10
    for launch in launches:
        key = arch, identity(launch)
        if key in _seen:
            continue
        try:
            code = compile_launch(launch, arch)
            assert_sound(code, arch)
            if launch.kernel.fn.__name__ == "strip_kernel":
                assert_on_strips(launch, code)
            elif "boxes_0" in launch.arguments:
                assert_loads_boxes(launch, code, arch)
            elif "PRECISION" in launch.arguments:
                assert_multiplies(launch, code, arch)
                if arch == 90 and numbers == "bf16" and not masked and is_forward(launch):
                    assert_slots(launch, code, SLOTS["pointers"])
            elif launch.kernel.fn.__name__ != "fold_kernel":
                assert code.instructions["LDG.E.128"], code.names
        except Exception as error:
            error.add_note(describe(launch))
            raise
        _seen.add(key)
