"""Registers of a matrix instruction in flight that are touched too early, found in a listing of Hopper machine code.

`wgmma` (HGMMA in SASS) goes on reading its operands, and writing its sums, after it was issued. PTX (wgmma.wait_group)
calls any access to these registers before the group was waited for undefined. In a listing of `nvdisasm -c`:

    HGMMA.64x64x16.F32.BF16 R24, R112, gdesc[UR20], R24, gsb0 ;    sums R24..R55, operand A R112..R115, ends a group
    WARPGROUP.DEPBAR.LE gsb0, 0x1 ;                                at most one group is in flight from here on

Operand B always lies in shared memory, A as well where it is written `HGMMA... R24, gdesc[UR20], R24`. `find` walks all
paths from the entry, loops included, until no path brings another set of groups in flight to an instruction.
"""

import re
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Their first register is read: comparisons (which write predicates), and what waits, branches or returns.
_WRITES_NO_REGISTER = re.compile(
    r"[A-Z]*SETP|FCHK|R2P|BAR|WARPSYNC|NANOSLEEP|B[RS]\w*|CALL|RET|EXIT|YIELD|NOP|WARPGROUP|DEPBAR|LDGSTS|CCTL|MEMBAR"
)
_OUT_OF_LINE = ("BRX", "BRXU", "JMX", "JMP")  # where these lead the walk does not see, unless they say so


class Instruction(NamedTuple):
    """One line: where it stands, its predicate ("" without), its mnemonic, its operands."""

    address: str
    predicate: str
    name: str
    operands: str


class InFlight(NamedTuple):
    """Of an HGMMA that may still run: where it was issued, the registers of A (none in shared memory), the sums."""

    address: str
    a: frozenset[int]
    sums: frozenset[int]


class Hazard(NamedTuple):
    """An access to the registers of a product in flight."""

    product: str  # address of the HGMMA
    operand: str  # "A" or "sums"
    by: str  # the instruction that comes too early


Groups = tuple[tuple[InFlight, ...], ...]  # committed ones, oldest first, and the open one


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and for each label the index of the one behind it."""
    instructions: list[Instruction] = []
    labels = {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2] or "", found[3], found[4]))
    return instructions, labels


def _block(operand: str, count: int) -> frozenset[int]:
    found = re.fullmatch(r"R(\d+)(?:\.\w+)*", operand)
    return frozenset(range(int(found[1]), int(found[1]) + count)) if found else frozenset()


def _operands(instruction: Instruction) -> list[str]:
    return [operand.strip() for operand in instruction.operands.split(",")]


def product(instruction: Instruction) -> InFlight:
    """What an HGMMA holds while it runs: 128 threads share sums of 64 rows and have 4 registers of A."""
    columns = int(_PRODUCT.match(instruction.name)[1])
    sums, a = _operands(instruction)[:2]
    halves = 2 if instruction.name.split(".")[2] == "F16" else 1  # sums in a register
    return InFlight(instruction.address, _block(a, 4), _block(sums, columns // 2 // halves))


def written(instruction: Instruction) -> frozenset[int]:
    """The registers that an instruction writes; those of one that is not known are taken to be its first operand."""
    if _WRITES_NO_REGISTER.fullmatch(instruction.name.split(".")[0]):
        return frozenset()
    targets = [operand for operand in _operands(instruction) if not re.fullmatch(r"!?U?P(\d|T)", operand)]
    return _block(targets[0], _width(instruction.name)) if targets else frozenset()


def _width(name: str) -> int:
    """Registers of a result."""
    base, *parts = name.split(".")
    if base in ("HMMA", "IMMA", "QMMA") or "128" in parts:
        return 4
    if base in ("LDSM", "MOVM"):
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if base == "CS2R":
        return 1 if "32" in parts else 2
    return 2 if {"64", "WIDE", "F64"} & set(parts) or base in ("DADD", "DMUL", "DFMA", "LEPC") else 1


def _touched(instruction: Instruction) -> frozenset[int]:
    """Every register that is named, and those that are written."""
    named = (int(number) for number in re.findall(r"\bR(\d+)", instruction.operands))
    return written(instruction) | frozenset(named)


def _step(instruction: Instruction, groups: Groups) -> Groups:
    """The groups in flight behind an instruction; the last one is open."""
    if _PRODUCT.match(instruction.name):
        groups = (*groups[:-1], (*groups[-1], product(instruction)))
        return (*groups, ()) if "gsb0" in instruction.operands else groups
    if instruction.name == "WARPGROUP.DEPBAR.LE":
        allowed = int(_operands(instruction)[1], 16)
        return (*groups[:-1][max(0, len(groups) - 1 - allowed) :], groups[-1])
    return groups


def _next(
    i: int, groups: Groups, instructions: list[Instruction], labels: dict[str, int], joins: dict[str, int]
) -> list[int]:
    """The instructions that may follow; a subroutine is stepped over."""
    instruction = instructions[i]
    base, always = instruction.name.split(".")[0], not instruction.predicate
    if base == "BRX" and "BRANCH_TARGETS" in instruction.operands:  # to the part of a warp, of several
        return [labels[target] for target in re.findall(r"\.L_x_\d+", instruction.operands)]
    if base in _OUT_OF_LINE:
        raise ValueError(f"find: the listing must branch to labels only, got {instruction}")
    if base == "CALL" and any(groups):
        raise ValueError(f"find: no subroutine must be called while a product is in flight, got {instruction}")
    if base in ("EXIT", "RET"):
        return [] if always else [i + 1]
    if base == "BRA":
        target = labels[_TARGET.search(instruction.operands)[1]]
        return [target] if always and not re.match(r"!?U?P\d", instruction.operands) else [i + 1, target]
    if base == "BSYNC":
        return [i + 1, joins[_operands(instruction)[0]]]
    return [i + 1]


def find(listing: str) -> list[Hazard]:
    """Every early access, ordered by where it is; writes to A, and any access to the sums by another instruction."""
    instructions, labels = parse(listing)
    joins = {
        _operands(one)[0]: labels[_TARGET.search(one.operands)[1]] for one in instructions if one.name[:4] == "BSSY"
    }
    found: set[Hazard] = set()
    seen: set[tuple[int, Groups]] = set()
    waiting: list[tuple[int, Groups]] = [(0, ((),))] if instructions else []
    while waiting:
        i, groups = waiting.pop()
        if (i, groups) in seen or i == len(instructions):
            continue
        seen.add((i, groups))
        instruction = instructions[i]
        if any(groups) and not _PRODUCT.match(instruction.name):
            found |= _early(instruction, groups)
        behind = _step(instruction, groups)
        waiting += [(after, behind) for after in _next(i, behind, instructions, labels, joins)]
    return sorted(found, key=lambda hazard: (int(hazard.by.split(":")[0], 16), hazard))


def _early(instruction: Instruction, groups: Groups) -> set[Hazard]:
    writes, touches = written(instruction), _touched(instruction)
    text = f"{instruction.address}: {instruction.name} {instruction.operands}"
    running = [one for group in groups for one in group]
    return {Hazard(one.address, "A", text) for one in running if writes & one.a} | {
        Hazard(one.address, "sums", text) for one in running if touches & one.sums
    }


def products_with_a_in_registers(listing: str) -> int:
    """How many HGMMA take operand A from registers."""
    return sum(bool(product(one).a) for one in parse(listing)[0] if _PRODUCT.match(one.name))
