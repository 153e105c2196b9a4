"""Cycles of the kernels of a residual block on a GPU, from counts: what each tile takes of four resources.

A tile issues instructions (a warp one a cycle), multiplies, moves bytes through shared memory, and loads bytes from L2:
every tap of a convolution loads its operand anew, past the first-level cache. Several thread blocks share a
multiprocessor and overlap, so a tile costs little more than its scarcest resource, and a launch what the busiest
multiprocessor has to do: the makespan of the tiles in their order, not their mean.

The counts (issue slots of a turn, of what is behind the sums, products of a step) are those of the machine code;
tests/kernels/test_machine_code.py and test_cuda_code.py compare them. Rates are of data sheets or publicly seen,
and nothing here was measured with these kernels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from den.nn.blocks import ResidualShape
from den_kernels._cuda_layout import FusedArguments, FusedLayout, fused_layout
from den_kernels._triton import boxes, choice, strips
from den_kernels._triton.choice import Side
from den_kernels._triton.rules import Tile


class Chip(NamedTuple):
    """A GPU: rates of one multiprocessor in a cycle, and of the memory in a second."""

    name: str
    arch: int
    multiprocessors: int
    clock: float  # cycles a second while the tensor cores work
    shared: int  # bytes that a thread block may have
    flops: float  # of 16-bit products in a cycle, by the widest instruction
    narrow: float  # cycles of a quarter of a multiprocessor for an `mma` of 16 x 8 x 16, which the fused kernel uses
    l2: float  # bytes a second from L2, all multiprocessors together
    bandwidth: float  # bytes a second of memory, read plus written
    dense: float  # share of the rate of products that cuDNN is taken to reach


# Data sheets, and for L2 what is publicly seen; H200: 790 TFLOP/s and 4.3 TB/s were measured on one. B200: L2 and the
# cycles of `mma` are guesses.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 80, 108, 1.41e9, 163 << 10, 2048, 8.0, 4.0e12, 1.75e12, 0.65),
        Chip("H200", 90, 132, 1.755e9, 227 << 10, 790e12 / 132 / 1.755e9, 6.45, 5.5e12, 4.3e12, 0.55),
        Chip("B200", 100, 148, 1.85e9, 227 << 10, 8192, 6.45, 9.0e12, 7.0e12, 0.5),
        Chip("RTX 4090", 89, 128, 2.5e9, 99 << 10, 512, 32.0, 4.5e12, 0.93e12, 0.85),
    )
}
OVERLAP = 0.9  # of its scarcest resource that a multiprocessor uses at best
SHARED_BYTES = 128  # of shared memory in a cycle, read plus written
LAUNCH = 1.5e-6  # seconds between two launches of a graph


class Slots(NamedTuple):
    """Issue slots of a warp, at most, in the Triton convolution."""

    turn: int  # of the loop: a step of a tap
    tile: int  # of all else that a tile of 128 x 64 takes, its second output included


SLOTS = {"boxes": Slots(120, 1160), "pointers": Slots(260, 1300)}
STRIP = Slots(280, 3000)  # on strips: a stage, a column of taps; all else of a tile of 256 x 64, loads included
ROUND_TRIP = 800  # cycles from a load of the result's row to its store


class Fused(NamedTuple):
    """Counts of the fused kernel's code: of a step of 32 bytes and a full warp, and cycles of what is around."""

    products: int  # `mma` of conv2's step
    loads: int  # `ldmatrix` of it
    load_cycles: float  # of shared memory, for one
    turn: int  # cycles of a step of the ring of weights that nothing covers
    locate: int  # of finding the map rows of a convolution, once a band
    recall: int  # of the same, in each slice
    activate: int  # of activating 1,024 pieces of 16 bytes
    add: int  # of 16 channels of a row of the result, loaded and stored


# Of the first kernel: rows found anew in each slice, bn1 loaded for every 16 bytes, a load of the result behind each
# store. Then rows kept in shared memory, bn1 in registers, four loads at a time.
BEFORE = Fused(32, 8, 4.0, turn=400, locate=0, recall=800, activate=1500, add=340)
CODE = Fused(32, 8, 4.0, turn=400, locate=800, recall=40, activate=700, add=100)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def makespan(tiles: Iterable[float], programs: int, multiprocessors: int, snake: bool = False) -> float:
    """Cycles of the busiest multiprocessor: programs take tiles in turn, and stand on multiprocessors in turn.

    snake: every other round of tiles goes backward.

    >>> makespan([4, 4, 2, 2, 1, 1], 2, 2), makespan([4, 3, 2, 1], 2, 2, snake=True)
    (7.0, 5.0)
    """
    loads = [0.0] * multiprocessors
    for i, cycles in enumerate(tiles):
        place = i % programs
        if snake and i // programs % 2:
            place = programs - 1 - place
        loads[place % multiprocessors] += cycles
    return max(loads)


def convolution_tile(tile: Tile, columns: int, depth: int, turns: int, boxed: bool, chip: Chip, itemsize: int) -> float:
    """Cycles of a tile of `columns` channels that takes `turns` steps of `depth` channels."""
    slots = SLOTS["boxes" if boxed else "pointers"]
    area = tile.rows * columns
    issue = turns * slots.turn + slots.tile * area / (128 * 64)
    loaded = turns * (tile.rows + columns) * depth * itemsize
    m, n = (columns, tile.rows) if boxed else (tile.rows, columns)  # products are turned on boxes
    read = turns * -(-m // 64) * (64 + n) * depth * itemsize
    product = turns * 2 * max(64, m) * n * depth / chip.flops
    of_l2 = loaded / (chip.l2 / chip.multiprocessors / chip.clock)
    return max(issue, product, (loaded + read) / SHARED_BYTES, of_l2) / OVERLAP


def strip_tile(tile: Tile, columns: int, depth: int, turns: int, adds: bool, chip: Chip, itemsize: int) -> float:
    """Cycles of a tile of `columns` channels on strips, in `turns` stages: three rows of taps by `depth` channels.

    What is loaded overlaps with all else. A program that has a multiprocessor for itself does not multiply while it
    stores; of two, one stores while the other multiplies.
    """
    halves = tile.warps // 4
    loaded = turns * strips.stage_bytes(columns, depth, 3, 1) // 2 * itemsize
    read = turns * 3 * strips.ROWS * (64 * halves + columns) * depth * itemsize
    product = turns * 2 * tile.rows * columns * 3 * depth / chip.flops
    issue = turns * STRIP.turn * halves
    behind = STRIP.tile * columns / 64 + (strips.ROWS * ROUND_TRIP if adds else 0)
    works = max(product, (loaded + read) / SHARED_BYTES, issue)
    of_l2 = loaded / (chip.l2 / chip.multiprocessors / chip.clock)
    return max(of_l2, works, (works + behind) / tile.programs) / OVERLAP


def convolution(
    p: FusedArguments, counts: Sequence[int], second: bool, chip: Chip, channels: tuple[Side, Side], size: int
) -> float:
    """Seconds of one launch: conv1 or (`second`) conv2 of a block, with counts[l] instances at level l."""
    n, k = channels
    stride = 1 if second else p.stride
    problem = boxes.Arguments(
        n, k, len(p.widths), (size, size), (stride,) * 2, 1, torch.bfloat16, False, True, second,
        pools=second and p.stride > 1,
    )  # fmt: skip
    wide = strips.is_wide(n.channels, p.B * size * size, chip.multiprocessors)
    stripped = strips.choose_strips(problem, False, chip.arch, wide)
    boxed = None if stripped else boxes.choose_boxes(problem, False, chip.arch)
    if stripped or boxed:
        tile, shape = stripped or boxed
    else:
        tile = choice.choose_tile(n.channels, k.channels, torch.bfloat16, chip.arch)
        shape = choice.shape_of_levels(n, k, len(p.widths), 1, True, tile)
    tiles: list[float] = []
    for segment, instances in enumerate(reversed(counts[1:])):
        bn, bk = (side[shape.rung[segment]] for side in (shape.bns, shape.bks))
        turns = 9 * -(-shape.k_widths[segment] // bk)
        if stripped:
            cycles = strip_tile(tile, bn, bk, turns // 3, second, chip, p.itemsize)
        else:
            cycles = convolution_tile(tile, bn, bk, turns, boxed is not None, chip, p.itemsize)
        tiles += [cycles] * (-(-instances * size * size // tile.rows) * shape.columns[segment])
    programs = min(len(tiles), tile.programs * chip.multiprocessors)
    return makespan(tiles, programs, chip.multiprocessors, snake=bool(stripped)) / chip.clock if tiles else 0.0


def two_launches(p: FusedArguments, counts: Sequence[int], chip: Chip) -> float:
    """Seconds of the block as two launches, each of which also takes at least as long as its maps take the memory."""
    size = -(-p.H // p.stride)
    groups = tuple(b - a for a, b in zip((0, *p.widths), p.widths, strict=False))
    hidden = Side(p.widths[-1], groups)
    active = sum(counts[1:])
    map_in, map_out = (p.itemsize * c * s * s for c, s in ((p.C, p.H), (p.C_out, size)))
    hidden_bytes = p.itemsize * size * size * sum(c * w for c, w in zip(counts[1:], p.widths, strict=True))
    first = convolution(p, counts, False, chip, (hidden, Side(p.C, ())), size)
    second = convolution(p, counts, True, chip, (Side(p.C_out, ()), hidden), size)
    first = max(first, (active * map_in + hidden_bytes) / chip.bandwidth)
    # The map is read and written, and what the next block reads is written beside it.
    second = max(second, (hidden_bytes + active * 3 * map_out) / chip.bandwidth)
    return first + second + 2 * LAUNCH


def fused_tile(p: FusedArguments, layout: FusedLayout, width: int, chip: Chip, code: Fused) -> float:
    """Cycles of one thread block of the fused kernel for the instances of a tile at a level of `width` channels."""
    rows_out, columns_out, total, y = -(-p.H // p.stride), -(-p.W // p.stride), 0.0, 0
    slice_ = 16 * layout.hidden_columns
    mma, ldsm = chip.narrow, code.load_cycles
    while y < rows_out:
        y1 = min(rows_out, y + layout.rows)
        h0, h1 = max(0, y - 1), min(rows_out, y1 + 1)
        hidden, out = (layout.instances * rows * columns_out for rows in (h1 - h0, y1 - y))
        f1 = ceil_div(ceil_div(hidden, 16), 8 // layout.hidden_columns)
        f2 = ceil_div(ceil_div(out, 16), 8 // layout.columns)
        pairs = -(-(p.C_out // 16) // layout.columns)
        for m in range(0, width, slice_):
            w = min(slice_, width - m)
            working = -(-w // 16) * (8 // layout.hidden_columns)  # warps that work in conv1
            steps1, steps2 = p.C * p.itemsize // 32 * 9, -(-w * p.itemsize // 32) * 9
            total += (
                steps1 * max((f1 + 1) * ldsm * working, f1 * 2 * mma * working / 4) + w * 9 * p.C * p.itemsize / 128
            )
            total += steps2 * max((f2 + pairs) * ldsm * 8, f2 * pairs * 2 * mma * 2)
            total += p.C_out * 9 * w * p.itemsize / 128
            turns = -(-9 // layout.taps1) * -(-p.C * p.itemsize // layout.bytes1)
            turns += -(-9 // layout.taps2) * -(-w * p.itemsize // layout.bytes2)
            total += turns * code.turn + 2 * code.recall
        last = min(p.H, (h1 - 1) * p.stride + 2)
        done = 0 if y == 0 else min(p.H, (min(rows_out, y + 1) - 1) * p.stride + 2)
        pieces = layout.instances * (last - done) * p.W * p.C * p.itemsize // 16
        total += -(-pieces // 1024) * code.activate
        total += f2 * 2 * (100 + pairs * code.add) + 2 * code.locate
        y = y1
    return total


class Traffic(NamedTuple):
    """Bytes that the fused kernel moves."""

    loaded: int  # of maps: x for the activations, and what the branch is added to
    stored: int
    streamed: int  # of weights, from L2


def fused_traffic(p: FusedArguments, counts: Sequence[int]) -> Traffic:
    """Traffic of a block that adds to a map, with counts[l] instances at level l.

    Raises ValueError where the fused kernel does not take the block.
    """
    layout = fused_layout(p)
    if layout is None:
        raise ValueError(f"fused_traffic: the problem must be one that the fused kernel takes, got {p}")
    rows, active = -(-p.H // p.stride), sum(counts[1:])
    map_in, map_out = p.itemsize * p.C * p.H * p.W, p.itemsize * p.C_out * rows * -(-p.W // p.stride)
    widths = sum(-(-count // layout.instances) * width for count, width in zip(counts[1:], p.widths, strict=True))
    streamed = -(-rows // layout.rows) * widths * 9 * (p.C + p.C_out) * p.itemsize
    return Traffic(active * (map_in + map_out), active * map_out, streamed)


def fused(p: FusedArguments, layout: FusedLayout, counts: Sequence[int], chip: Chip, code: Fused = CODE) -> float:
    """Seconds of the block in the fused kernel, which streams all weights of a level from L2 for each tile."""
    tiles: list[float] = []
    for instances, width in zip(reversed(counts[1:]), reversed(p.widths), strict=True):
        tiles += [fused_tile(p, layout, width, chip, code)] * -(-instances // layout.instances)
    traffic = fused_traffic(p, counts)
    cycles = makespan(tiles, layout.blocks, chip.multiprocessors, snake=True)
    bytes_ = (traffic.loaded + traffic.stored) / chip.bandwidth
    return max(cycles / chip.clock, traffic.streamed / chip.l2, bytes_) + LAUNCH


def problem_of(block: ResidualShape, B: int, chip: Chip) -> FusedArguments:
    """The block as a problem in bfloat16, its hidden groups a quarter, a quarter and a half."""
    widths = block.channels // 4, block.channels // 2, block.channels
    size = block.in_size
    return FusedArguments(
        B, size, size, block.in_channels, block.channels, widths, block.stride, 2, chip.multiprocessors, chip.shared
    )
