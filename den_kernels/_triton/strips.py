"""When a convolution runs on strips (strip_kernel.py), and its launch."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import choice, rules
from .boxes import Arguments, map_strides
from .choice import Shape, Side, ceil_power, shape_of_levels
from .rules import Tile

ROWS = 4  # of a strip: output pixels are 64 in each
SHARED = 227 << 10  # bytes that the programs of a Hopper multiprocessor share
MOST_STAGES = 4


@lru_cache(maxsize=1)
def is_known() -> bool:
    """True where Triton compiles the kernel: releases whose Gluon it was written for; the interpreter knows none."""
    try:
        from triton.runtime import JITFunction

        from .strip_kernel import strip_kernel  # noqa: F401
        from .strip_loads import find_turn
    except (ImportError, AttributeError):
        return False
    known = rules.installed().split(".")[:2] == list(map(str, rules.release_of(rules.installed())))
    return known and isinstance(find_turn, JITFunction)


def stage_bytes(columns: int, depth: int, taps: int, dilation: int) -> int:
    """Bytes of a stage: rows of 64 pixels, and weights of a column of taps."""
    return 2 * depth * (64 * (ROWS + (taps - 1) * dilation) + taps * columns)


def tile_by_rule(k: int, taps: int, dilation: int, wide: bool) -> Tile | None:
    """The tile where outputs read up to k channels, with `taps` rows of taps; None where two stages do not fit.

    Wide ones have a multiprocessor for themselves, and two groups of four warps share their channels.

    >>> tile_by_rule(64, 3, 1, False), tile_by_rule(256, 5, 1, True)
    (Tile(rows=256, columns=64, depth=32, warps=4, stages=2, programs=2), None)
    """
    columns, programs = (128, 1) if wide else (64, 2)
    depth = ceil_power(k, 16, 64 if wide else 32)
    room = SHARED // programs - (2 << 10) - 64 * 4 * columns  # barriers, and sums that change their layout
    stages = min(MOST_STAGES, room // stage_bytes(columns, depth, taps, dilation))
    return Tile(64 * ROWS, columns, depth, 8 if wide else 4, stages, programs) if stages > 1 else None


def is_wide(n: int, pixels: int, multiprocessors: int) -> bool:
    """True where wide tiles of n channels are more than the multiprocessors: with fewer, a mix of levels idles half.

    >>> is_wide(128, 256 * 16 * 16, 132), is_wide(256, 256 * 8 * 8, 132), is_wide(64, 256 * 32 * 32, 132)
    (True, False, False)
    """
    return n > 64 and -(-pixels // (64 * ROWS)) * -(-n // 128) > multiprocessors


def choose_strips(p: Arguments, skip_empty: bool, arch: int, wide: bool) -> tuple[Tile, Shape] | None:
    """The tile and the segments of a convolution on strips; None where it runs on boxes or pointers.

    Strips need compute capability 9.0, 16-bit numbers, stride 1, levels, more than one row of taps, maps whose height
    strips divide and whose width is 8, 16, 32 or 64; a shortcut that is pooled behind the sums leaves no registers. A
    tuned tile is one of boxes or pointers.
    """
    OH, OW = p.out_size
    if arch != 90 or p.dtype.itemsize != 2 or p.masked or p.cardinality > 1 or p.stride != (1, 1) or not p.aligned:
        return None
    if p.pools or p.taps == 1 or OW not in (8, 16, 32, 64) or OH % ROWS or not is_known():
        return None
    if choice.tuned("convolve", p.n.channels, p.k.channels, p.dtype, arch):
        return None
    tile = tile_by_rule(p.k.channels, p.taps, p.dilation, wide)
    if tile is None:
        return None
    shape = shape_of_levels(p.n, p.k, p.groups, 1, skip_empty, tile)
    return (tile, shape) if all(shape.evens) else None


@lru_cache(maxsize=1024)
def take_block(
    groups: tuple[int, ...], out_channels: int, out_size: tuple[int, int], stride: int, dtype: torch.dtype, arch: int
) -> bool:
    """True where the second convolution, 3 x 3, of a residual block over levels runs on strips.

    Two launches are then predicted faster than the fused kernel (benchmarks/gpu_model.py).
    """
    sides = Side(out_channels, ()), Side(sum(groups), groups)
    wanted = Arguments(*sides, len(groups), out_size, (1, 1), 1, dtype, False, True, True, pools=stride > 1)
    return choose_strips(wanted, False, arch, False) is not None


def arguments_of(
    source: Tensor,  # [B, KC, H, W] channels-last
    weight: Tensor,  # [out, in, R, S] channels-last
    chosen: tuple[Tile, Shape],
    columns: int,  # OW
    transposed: bool,
) -> dict[str, Any]:
    """The kernel's arguments for a tile and its segments: descriptors for each rung, None for rungs that are not."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def layout(elements: int, rank: int) -> NVMMASharedLayout:
        return NVMMASharedLayout(min(128, 2 * elements), 16, rank)

    tile, shape = chosen
    B, KC, H, W = source.shape
    outs, ins, R, S = weight.shape
    strides = map_strides(source)
    made: dict[str, Any] = {f"{name}_{r}": None for name in ("boxes", "weights") for r in range(3)}
    for r, (bn, bk) in enumerate(zip(shape.bns, shape.bks, strict=True)):
        made[f"boxes_{r}"] = TensorDescriptor(source, [B, H, W, KC], strides, [1, 1, columns, bk], layout(bk, 4))
        block = [bk, bn] if transposed else [bn, bk]
        made[f"weights_{r}"] = TensorDescriptor(
            weight, [outs, R * S * ins], [R * S * ins, 1], block, layout(block[1], 2)
        )
    registers = {"maxnreg": 128} if tile.programs > 1 else {}  # at the start, so that two programs fit
    return made | registers | dict(
        IN=ins, N_WIDTHS=shape.n_widths, K_WIDTHS=shape.k_widths, COLUMNS=shape.columns, RUNG=shape.rung,
        BNS=shape.bns, BKS=shape.bks, ROWS=ROWS, STAGES=tile.stages, MOST_N=max(shape.bns), MOST_K=max(shape.bks),
        num_warps=tile.warps,
    )  # fmt: skip
