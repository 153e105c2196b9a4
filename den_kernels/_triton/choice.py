"""The launch settings of the kernels: functions of the problem, the dtype, the architecture and Triton's release."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch

from . import rules, table
from .rules import Tile

# How a side of the GEMM follows a mask, as conv_kernel.py reads it.
ALL, BITS, UNITS = 0, 1, 2


class Side(NamedTuple):
    """One side of a convolution: its channels, and its channel groups, () where it is not elastic."""

    channels: int
    sizes: tuple[int, ...]

    def widths(self, groups: int) -> tuple[int, ...]:
        """The channels of levels `groups`, ..., 1, 0.

        >>> Side(64, (16, 16, 32)).widths(3)
        (64, 32, 16, 0)
        """
        if not self.sizes:
            return (self.channels,) * (groups + 1)
        return tuple(reversed((0, *accumulate(self.sizes))))


class Shape(NamedTuple):
    """The work of each segment: its widths, its column tiles and its rung (a tile shape); and the tile of each rung."""

    n_widths: tuple[int, ...]
    k_widths: tuple[int, ...]
    columns: tuple[int, ...]
    rung: tuple[int, ...]
    bns: tuple[int, ...]
    bks: tuple[int, ...]
    evens: tuple[bool, ...]


def ceil_power(width: int, least: int, most: int) -> int:
    """The power of two that holds `width`, within bounds that are powers of two.

    >>> ceil_power(24, 16, 128), ceil_power(1, 16, 128), ceil_power(500, 16, 128)
    (32, 16, 128)
    """
    return max(least, min(most, 1 << max(width - 1, 0).bit_length()))


def tuned(kind: str, n: int, k: int, dtype: torch.dtype, arch: int) -> Tile | None:
    """The tile that the table of the architecture has for n channels written and k read, None where it has none."""
    found = table.tiles(arch).get(table.key(kind, ceil_power(n, 16, 512), ceil_power(k, 16, 512), dtype))
    return Tile(*found) if found else None


def choose_tile(n: int, k: int, dtype: torch.dtype, arch: int, ieee: bool = False) -> Tile:
    """The tile of a convolution that writes up to n channels from up to k; `arch` is 80 for compute capability 8.0.

    A tuned one where the table of the architecture has it (table.py), else by rule (rules.py). IEEE float32 (`ieee`)
    knows no tensor core; tables, tuned with TF32, do not count there.
    """
    found = None if ieee else tuned("convolve", n, k, dtype, arch)
    if found:
        return found
    tile = rules.find("convolve", arch, rules.numbers_of(dtype, ieee), n)
    return tile._replace(columns=ceil_power(n, 16, tile.columns), depth=ceil_power(k, 16, tile.depth))


def unit_of(sizes: Sequence[int], most: int) -> int:
    """The largest power of two up to `most` that divides all group sizes: channels that are selected together.

    >>> unit_of((32, 32, 64), 128), unit_of((24, 40), 64)
    (32, 8)
    """
    common = gcd(*sizes) if sizes else most
    return min(most, common & -common)


@lru_cache(maxsize=1024)
def shape_of_levels(
    n: Side, k: Side, groups: int, cardinality: int, skip_empty: bool, tile: Tile, least: int = 16
) -> Shape:
    """The segments of a route of levels, of tiles of at least `least` columns.

    skip_empty: instances at level 0 are left alone.
    """
    n_widths, k_widths = n.widths(groups), k.widths(groups)
    if n.sizes or skip_empty:  # level 0 writes nothing
        n_widths, k_widths = n_widths[:-1], k_widths[:-1]
    rungs: list[tuple[int, int]] = []
    chosen = []
    for n_width, k_width in zip(n_widths, k_widths, strict=True):
        rung = ceil_power(n_width, least, tile.columns), ceil_power(k_width, 16, tile.depth)
        if k_width == 0 and rungs:  # takes no step
            rung = rungs[-1]
        if rung not in rungs and len(rungs) < 3:
            rungs.append(rung)
        chosen.append(rungs.index(rung) if rung in rungs else len(rungs) - 1)
    return Shape(
        n_widths,
        k_widths,
        tuple(-(-width // rungs[r][0]) for width, r in zip(n_widths, chosen, strict=True)),
        tuple(chosen),
        tuple(bn for bn, _ in rungs),
        tuple(bk for _, bk in rungs),
        tuple(_is_even(i, chosen, k_widths, bk, k.channels // cardinality) for i, (_, bk) in enumerate(rungs)),
    )


@lru_cache(maxsize=1024)
def shape_of_masks(n: Side, k: Side, cardinality: int, tile: Tile) -> tuple[Shape, int, int]:
    """The shape of a route of masks, one segment, and for each side ALL, BITS or UNITS."""
    bn, bk = ceil_power(n.channels, 16, tile.columns), ceil_power(k.channels, 16, tile.depth)
    n_mask = k_mask = ALL
    if n.sizes:
        unit = unit_of(n.sizes, bn)
        n_mask, bn = (UNITS, unit) if unit >= 16 else (BITS, bn)
    if k.sizes:
        unit = unit_of(k.sizes, bk)
        k_mask, bk = (UNITS, unit) if unit >= 16 and cardinality == 1 else (BITS, bk)
    even = k.channels % bk == 0 and (cardinality == 1 or k.channels // cardinality % bk == 0)
    columns = -(-n.channels // bn)
    return Shape((n.channels,), (k.channels,), (columns,), (0,), (bn,), (bk,), (even,)), n_mask, k_mask


def _is_even(rung: int, chosen: Sequence[int], k_widths: Sequence[int], bk: int, per_group: int) -> bool:
    return per_group % bk == 0 and all(
        width % bk == 0 for width, other in zip(k_widths, chosen, strict=True) if other == rung
    )


def choose_weight_tile(n: Side, k: Side, dtype: torch.dtype, arch: int, masked: bool, ieee: bool = False) -> Tile:
    """The tile of a weight gradient: pixels of a step, output channels, input channels of one tap.

    Tuned for levels where the table of the architecture has it. By rule, on an elastic side a tile is as wide as the
    rule or the groups allow, but not under 64: there a wider tile that some instances fill in part costs less than
    reading the other side once more. For masks it stays within a group.
    """
    found = None if masked or ieee else tuned("weight", n.channels, k.channels, dtype, arch)
    if found:
        return found
    numbers = rules.numbers_of(dtype, ieee)
    most = rules.find("weight", arch, numbers, 0)
    sides = []
    for side, width in ((n, most.columns), (k, most.depth)):
        width = ceil_power(side.channels, 16, width)
        if side.sizes:
            width = max(unit_of(side.sizes, width), 16 if masked else min(width, 64))
        sides.append(width)
    return rules.find("weight", arch, numbers, sides[0] * sides[1])._replace(columns=sides[0], depth=sides[1])


def k_tiles(n_channels: int, k_channels: int, cardinality: int, tile: Tile) -> int:
    """Tiles of input channels that a tile of output channels meets: those of its cardinality groups."""
    per_group = n_channels // cardinality
    groups = min(cardinality, 1 if per_group % tile.columns == 0 else (tile.columns - 2) // per_group + 2)
    if tile.columns % per_group == 0:
        groups = min(cardinality, tile.columns // per_group)
    return -(-groups * (k_channels // cardinality) // tile.depth)


def _fits(side: Side, step: int) -> bool:
    return not side.sizes or unit_of(side.sizes, step) == step


def listed_side(n: Side, k: Side, cardinality: int, tile: Tile) -> str:
    """The side of a mask whose units get lists of instances: "n" (outputs), "k" (inputs), "" where tiles straddle."""
    if n.sizes and _fits(n, tile.columns):
        return "n"
    return "k" if k.sizes and cardinality == 1 and _fits(k, tile.depth) else ""


def wide_sides(n: Side, k: Side, cardinality: int, tile: Tile) -> tuple[bool, bool]:
    """True for each side (n, k) on which a group may end inside a tile, under levels."""
    return not _fits(n, tile.columns), bool(k.sizes) and not (cardinality == 1 and _fits(k, tile.depth))


def choose_splits(tiles: int, pixels: int, tile: Tile, multiprocessors: int) -> int:
    """Shares into which the pixels are split: enough programs for two waves, at least 16 steps in each."""
    wanted = -(-4 * multiprocessors // max(tiles, 1))
    return max(1, min(wanted, pixels // (16 * tile.rows)))
