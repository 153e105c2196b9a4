"""The detector of registers that are overwritten under a matrix instruction in flight: on listings, and on a kernel."""

import re

import pytest

from tests.wgmma_hazards import InFlight, find, parse, product, products_with_a_in_registers, written


def listing(*lines: str) -> str:
    """As nvdisasm prints it: labels end in a colon, instructions get addresses 0, 16, 32, ..."""
    printed, address = [], 0
    for line in lines:
        if line.endswith(":"):
            printed.append(line)
            continue
        printed.append(f"        /*{address:04x}*/                   {line} ;")
        address += 16
    return "\n".join(printed)


A_IN_REGISTERS = "HGMMA.64x32x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0"
GROUP_OPENS = "HGMMA.64x32x16.F32.BF16 R40, R56, gdesc[UR8], R40"
A_IN_SHARED = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT_ALL, ONE_MAY_RUN = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}" for left in (0, 1))


@pytest.mark.parametrize(
    ("lines", "hazards"),
    [
        ([A_IN_REGISTERS, WAIT_ALL, "LDS.128 R60, [R8]"], []),
        ([A_IN_REGISTERS, "LDS.128 R60, [R8]", WAIT_ALL], [("A", "0010")]),
        ([A_IN_REGISTERS, "LDS.128 R64, [R8]", WAIT_ALL], []),
        ([A_IN_REGISTERS, "LDS.128 R57, [R8]", WAIT_ALL], [("A", "0010")]),  # its last register
        ([A_IN_REGISTERS, "LDS R59, [R8]", "STS.128 [R8], R60", WAIT_ALL], []),  # reads are harmless
        ([A_IN_REGISTERS, "ISETP.GE.AND P0, PT, R60, R61, PT", WAIT_ALL], []),
        ([A_IN_SHARED, "LDS.128 R60, [R8]", WAIT_ALL], []),
        ([A_IN_SHARED, "FADD R9, R24, R25", WAIT_ALL], [("sums", "0010")]),
        ([A_IN_SHARED, WAIT_ALL, "FADD R9, R24, R25"], []),
        ([A_IN_REGISTERS, ONE_MAY_RUN, "MOV R60, RZ"], [("A", "0020")]),
        ([GROUP_OPENS, A_IN_REGISTERS, ONE_MAY_RUN, "MOV R56, RZ"], [("A", "0030")]),
        ([A_IN_REGISTERS, "HGMMA.64x32x16.F32.BF16 R24, R64, gdesc[UR8], R24, gsb0", ONE_MAY_RUN, "MOV R60, RZ"], []),
        ([A_IN_REGISTERS, "@P0 BRA `(.L_x_0)", WAIT_ALL, ".L_x_0:", "MOV R60, RZ"], [("A", "0030")]),  # one path waits
        ([A_IN_REGISTERS, "@P0 EXIT", "BRA `(.L_x_0)", "MOV R60, RZ", ".L_x_0:", WAIT_ALL, "MOV R60, RZ"], []),
        ([A_IN_REGISTERS, "EXIT", "MOV R60, RZ"], []),
    ],
)  # fmt: skip
def test_what_comes_before_the_wait_is_found(lines, hazards):
    assert [(found.operand, found.by[:4]) for found in find(listing(*lines))] == hazards


def test_a_loop_is_walked_round():
    """The write stands before the product, and is early only on the second turn."""
    body = [".L_x_1:", "LDS.128 R60, [R8]", "WARPGROUP.ARRIVE", A_IN_REGISTERS, ONE_MAY_RUN, "@P0 BRA `(.L_x_1)"]
    (found,) = find(listing(*body, WAIT_ALL, "EXIT"))
    assert (found.product, found.operand, found.by) == ("0020", "A", "0000: LDS.128 R60, [R8]")
    body[4] = WAIT_ALL
    assert find(listing(*body, "EXIT")) == []


def test_branches_that_meet_again_are_followed():
    lines = ["BSSY B0, `(.L_x_2)", A_IN_REGISTERS, "BSYNC B0", WAIT_ALL, ".L_x_2:", "MOV R61, RZ", "EXIT"]
    assert len(find(listing(*lines))) == 1


def test_where_the_walk_cannot_go_is_an_error():
    with pytest.raises(ValueError, match="must branch to labels only"):
        find(listing("BRX R4 -0x10"))
    with pytest.raises(ValueError, match="no subroutine must be called while a product is in flight"):
        find(listing(A_IN_REGISTERS, "CALL.REL.NOINC `($slow)"))
    slow = ["CALL.REL.NOINC `($slow)", A_IN_REGISTERS, "MOV R60, RZ", "EXIT", "RET.REL.NODEC R4"]
    assert [found.by[:4] for found in find(listing(*slow))] == ["0020"]  # a subroutine is stepped over


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("LDS.128 R60, [R8+UR11+0x6800]", {60, 61, 62, 63}),
        ("LDSM.16.M88.4 R4, [R2]", {4, 5, 6, 7}),
        ("LDSM.16.MT88.2 R4, [R2]", {4, 5}),
        ("IMAD.WIDE R4, R8, 0x2, R6", {4, 5}),
        ("LDG.E.64.CONSTANT R4, desc[UR4][R2.64]", {4, 5}),
        ("CS2R R24, SRZ", {24, 25}),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", {5}),
        ("IADD3 R4, P0, R6, R8, RZ", {4}),
        ("HMMA.16816.F32.BF16 R12, R4, R8, R12", {12, 13, 14, 15}),
        ("FFMA R7.reuse, R1, R2, R3", {7}),
        ("UMOV UR4, 0x3", set()),
        ("STG.E.128 desc[UR4][R2.64], R8", set()),
        ("R2UR UR4, R9", set()),
        ("LDGSTS.E.BYPASS.128 [R9+0x800], desc[UR4][R2.64], P1", set()),
    ],
)
def test_registers_that_instructions_write(line, registers):
    ((instruction,), _) = parse(listing(line))
    assert written(instruction) == registers


def test_registers_that_a_product_holds():
    def held(line):
        return product(parse(listing(line))[0][0])

    assert held(A_IN_REGISTERS) == InFlight("0000", frozenset(range(60, 64)), frozenset(range(24, 40)))
    assert held("HGMMA.64x128x8.F32.TF32 R24, gdesc[UR8], RZ, !UPT").sums == frozenset(range(24, 88))
    assert held("HGMMA.64x32x16.F16 R24, gdesc[UR8], R24").sums == frozenset(range(24, 32))
    assert products_with_a_in_registers(listing(A_IN_REGISTERS, A_IN_SHARED)) == 1


@pytest.mark.slow
def test_a_prologue_between_load_and_product_is_the_hazard():
    """What conv1 of a residual block once was: relu(a * scale + shift) between the load and tl.dot."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from tests.prologue_kernel import compiled

    code = compiled(prologue=True)
    assert products_with_a_in_registers(code.listing) > 0
    release = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    assert bool(find(code.listing)) == (release < (3, 8))  # later ones wait, or copy the registers
    code = compiled(prologue=False)
    assert re.search(r"\bHGMMA", code.names)
    assert products_with_a_in_registers(code.listing) == 0
    assert find(code.listing) == []
