"""When a convolution runs on boxes that the copy engine loads (box_kernel.py), and its launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import choice
from .choice import Shape, Side, ceil_power, shape_of_levels
from .rules import Tile


class Arguments(NamedTuple):
    """A convolution over levels, as the choice needs to know it."""

    n: Side
    k: Side
    groups: int  # channel groups of the route
    out_size: tuple[int, int]  # OH, OW
    stride: tuple[int, int]
    cardinality: int
    dtype: torch.dtype
    masked: bool
    aligned: bool  # strides and addresses are multiples of 16 bytes
    heavy: bool  # the step behind the sums reads or writes a second map
    taps: int = 3  # rows of them
    dilation: int = 1  # of rows
    pools: bool = False  # a shortcut is pooled behind the sums


def tile_by_rule(n: int, k: int, out_size: tuple[int, int]) -> Tile | None:
    """The tile where n channels are written, of up to k; None where no whole rows of a map make one.

    >>> tile_by_rule(64, 64, (32, 32))
    Tile(rows=128, columns=64, depth=64, warps=4, stages=3, programs=3)
    >>> tile_by_rule(64, 64, (7, 7)) is None
    True
    """
    rows = next((rows for rows in (128, 64) if holds_rows(rows, out_size)), 0)
    columns = 128 if n >= 128 else 64
    programs = 2 if rows * columns > 128 * 64 else 3  # that the shared memory of a Hopper multiprocessor holds
    return Tile(rows, columns, ceil_power(k, 16, 64), 4, 3, programs) if rows else None


def holds_rows(pixels: int, out_size: tuple[int, int]) -> bool:
    """True where a tile of `pixels` is whole rows of a map, and the map whole tiles."""
    OH, OW = out_size
    return OW & (OW - 1) == 0 and OW <= 256 and pixels % OW == 0 and OH * OW % pixels == 0


def choose_boxes(p: Arguments, skip_empty: bool, arch: int) -> tuple[Tile, Shape] | None:
    """The tile and the segments of a convolution on boxes; None where it runs on pointers.

    Boxes need compute capability 9.0, 16-bit numbers (TF32 weights would have to be turned), stride 1, levels, and
    maps of whole tiles of whole rows whose width is a power of two. A width that a box of channels does not divide
    would read channels that nobody wrote. A tuned tile that is none of boxes means pointers.
    """
    if arch < 90 or p.dtype.itemsize != 2 or p.masked or p.cardinality > 1 or p.stride != (1, 1) or not p.aligned:
        return None
    tile = choice.tuned("convolve", p.n.channels, p.k.channels, p.dtype, arch)
    tile = tile or tile_by_rule(p.n.channels, p.k.channels, p.out_size)
    if tile is None or tile.columns < 64 or not holds_rows(tile.rows, p.out_size):
        return None
    if p.heavy and tile.rows * tile.columns > 128 * 64:
        tile = tile._replace(columns=64)  # registers would spill
    elif p.heavy and tile.columns > 64:
        tile = tile._replace(programs=min(tile.programs, 2))  # that registers are left for
    shape = shape_of_levels(p.n, p.k, p.groups, 1, skip_empty, tile, least=64)  # a product has 64 rows, here channels
    return (tile, shape) if all(shape.evens) else None


def is_aligned(source: Tensor, weight: Tensor) -> bool:
    """True where descriptors can be made of source [B, KC, H, W] and weight [out, in, R, S], both channels-last."""
    of_weight = weight[0].numel() if len(weight) > 1 else 0
    strides = *(source.stride(d) for d in (0, 2, 3) if source.shape[d] > 1), of_weight
    bytes_ = source.itemsize
    return all(s * bytes_ % 16 == 0 for s in strides) and not (source.data_ptr() % 16 or weight.data_ptr() % 16)


def map_strides(source: Tensor) -> list[int]:
    """Strides of source [B, KC, H, W], channels-last, as a descriptor of [B, H, W, KC] has them."""
    whole = source.shape[1:].numel()  # for sides of 1, whose strides mean nothing
    strides = [stride if side > 1 else whole for stride, side in zip(source.stride(), source.shape, strict=True)]
    return [strides[0], strides[2], strides[3], 1]


def arguments_of(
    source: Tensor,  # [B, KC, H, W] channels-last
    weight: Tensor,  # [out, in, R, S] channels-last
    chosen: tuple[Tile, Shape],
    columns: int,  # OW
    transposed: bool,
) -> dict[str, Any]:
    """The kernel's arguments for a tile and its segments: descriptors for each rung, None for rungs that are not."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile, shape = chosen
    B, KC, H, W = source.shape
    outs, ins, R, S = weight.shape
    strides = map_strides(source)
    made: dict[str, Any] = {f"{name}_{r}": None for name in ("boxes", "weights") for r in range(3)}
    for r, (bn, bk) in enumerate(zip(shape.bns, shape.bks, strict=True)):
        made[f"boxes_{r}"] = TensorDescriptor(source, [B, H, W, KC], strides, [1, tile.rows // columns, columns, bk])
        block = [bk, bn] if transposed else [bn, bk]
        made[f"weights_{r}"] = TensorDescriptor(weight, [outs, R * S * ins], [R * S * ins, 1], block)
    return made | dict(
        IN=ins, N_WIDTHS=shape.n_widths, K_WIDTHS=shape.k_widths, COLUMNS=shape.columns, RUNG=shape.rung,
        BNS=shape.bns, BKS=shape.bks, BM=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
