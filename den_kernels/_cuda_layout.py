"""The layout of the fused residual block (csrc/dynamic_residual.cu) on a GPU: a pure function of the problem.

A thread block has 8 warps. In conv2 `columns` of them share the output channels (64 each at most) and the others the
pixels (64 each); in conv1 `hidden_columns` share a slice of hidden channels (16 each) and the others its pixels (64
each). Kernel and layout agree on shared memory: `FusedLayout.shared` is csrc/fused_layout.h.
"""

from collections.abc import Iterator
from typing import NamedTuple

WARPS, STAGES, PAD = 8, 3, 16
WARP_PIXELS, WARP_CHANNELS = 64, 64  # a warp's share is at most this
LEAST_PIXELS = 128  # fewest pixels that share a read of the weights: with fewer, two launches are predicted faster
PLACES = 8 * 32 * WARPS * 4  # bytes: each thread has a word for each fragment of pixels, hidden ones and the result's
STAGE_BYTES = 24 << 10  # largest step of weights: a larger one only delays the first product


class FusedArguments(NamedTuple):
    """Sizes of a batch, a residual block and a GPU, on which a launch of the fused kernel depends."""

    B: int
    H: int
    W: int
    C: int
    C_out: int
    widths: tuple[int, ...]  # hidden channels of levels 1..G
    stride: int
    itemsize: int
    multiprocessors: int
    shared: int  # bytes that a thread block may have


class FusedLayout(NamedTuple):
    """The struct of this name in csrc/cuda_ops.h, which explains each field."""

    instances: int
    rows: int
    columns: int
    hidden_columns: int
    taps1: int
    bytes1: int
    taps2: int
    bytes2: int
    blocks: int

    def maps_bytes(self, p: FusedArguments) -> int:
        """Shared memory of the row of zeros, the activations, a slice of the hidden map and the places of pixels."""
        hidden_rows = min(-(-p.H // p.stride), self.rows + 2)
        in_rows = min(p.H, (hidden_rows - 1) * p.stride + 3)
        row, hidden_row = p.C * p.itemsize + PAD, 16 * self.hidden_columns * p.itemsize + PAD
        pixels = in_rows * p.W * row + hidden_rows * -(-p.W // p.stride) * hidden_row
        return max(row, hidden_row) + self.instances * pixels + PLACES

    def shared(self, p: FusedArguments) -> int:
        """Shared memory in bytes."""
        slice1 = 16 * self.hidden_columns * (self.taps1 * self.bytes1 + PAD)
        slice2 = p.C_out * (self.taps2 * self.bytes2 + PAD)
        return self.maps_bytes(p) + STAGES * max(slice1, slice2)

    def is_worth(self, p: FusedArguments) -> bool:
        """True where the kernel should win over two launches, whose tiles are pixels of many instances.

        A byte of weights serves as many FLOPs as pixels share it, in float32 half as many, at half the rate: one
        instance of 8 x 8 asks 12 TB/s of L2. `benchmarks/gpu_model.py` predicts both ways from counts; nothing here was
        measured.
        """
        return self.instances * self.rows * -(-p.W // p.stride) >= LEAST_PIXELS


def _tiles(p: FusedArguments) -> Iterator[tuple[int, int, int]]:
    """Triples (instances, rows, columns) to try, best first."""
    Ho, Wo = -(-p.H // p.stride), -(-p.W // p.stride)
    columns = [n for n in (1, 2, 4, 8) if n * WARP_CHANNELS >= p.C_out]
    pixels = {n: WARPS // n * WARP_PIXELS for n in columns}
    most = max(pixels.values(), default=0) // (Ho * Wo)
    for T in range(min(most, max(1, p.B // p.multiprocessors)), 0, -1):  # maps share a read of the weights, but every
        for n in reversed(columns):  # multiprocessor gets some; most columns first, so that no warp lacks pixels
            if T * Ho * Wo <= pixels[n]:
                yield T, Ho, n
    for n in columns:  # bands as high as fit: each computes two hidden rows that its neighbours compute too
        rows = min(pixels[n] // Wo, WARPS * WARP_PIXELS // Wo - 2)
        if rows >= 1:
            yield 1, min(Ho, rows), n


def _hidden_columns(p: FusedArguments, instances: int, rows: int) -> int | None:
    """Warps that share a slice: as many as the pixels leave; no slice wider than the narrowest level if possible."""
    pixels = instances * min(-(-p.H // p.stride), rows + 2) * -(-p.W // p.stride)
    fits = [n for n in (1, 2, 4, 8) if pixels <= WARPS // n * WARP_PIXELS]
    narrow = [n for n in fits if 16 * n <= min(p.widths)]
    return max(narrow or fits[:1], default=None)


def _step(rows: int, whole: int, room: int) -> tuple[int, int] | None:
    """The longest step of weights, (taps, bytes of each): `rows` rows of `whole` bytes a tap, in `room` bytes."""
    halves = [(1, -(-whole // (parts * 32)) * 32) for parts in (2, 4, 8, 16, 32, 64)]
    steps = [(9, whole), (3, whole), (1, whole), *halves]
    return next((step for step in steps if rows * (step[0] * step[1] + PAD) <= room), None)


def fused_layout(p: FusedArguments) -> FusedLayout | None:
    """The layout of a problem, None where the fused kernel does not take it or should not.

    >>> fused_layout(FusedArguments(512, 16, 16, 128, 128, (32, 64, 128), 1, 2, 132, 227 << 10))
    FusedLayout(instances=1, rows=16, columns=2, hidden_columns=2, taps1=1, bytes1=256, taps2=1, bytes2=64, blocks=132)
    """
    channels = (p.C, p.C_out, *p.widths)
    if p.stride not in (1, 2) or len(p.widths) > 32 or any(c % 16 or c == 0 for c in channels) or p.C_out < p.C:
        return None
    if p.multiprocessors > 2 * p.B:  # one instance is one thread block: most multiprocessors would stand idle
        return None
    for instances, rows, columns in _tiles(p):
        hidden = _hidden_columns(p, instances, rows)
        if hidden is None:
            continue
        layout = FusedLayout(instances, rows, columns, hidden, 0, 0, 0, 0, 0)
        room = min(STAGE_BYTES, (p.shared - layout.maps_bytes(p)) // STAGES)
        step1 = _step(16 * hidden, p.C * p.itemsize, room)
        step2 = _step(p.C_out, 16 * hidden * p.itemsize, room)
        if step1 and step2:
            tiles = -(-p.B // instances) + len(p.widths)
            return FusedLayout(instances, rows, columns, hidden, *step1, *step2, min(p.multiprocessors, tiles))
    return None
