"""The kernel's own tile lookup, run: every tile that the levels need is visited once, and no other."""

import pytest
import torch
import triton
import triton.language as tl

from den_kernels._triton import choice
from den_kernels._triton.choice import Side
from den_kernels._triton.conv_kernel import count_tiles, find_tile
from den_kernels._triton.rules import Tile
from den_kernels.plan import as_route
from den_kernels.testing import LEVEL_KINDS, make_levels


@triton.jit
def look_up(out, offsets, pixels, COLUMNS: tl.constexpr, CLASSES: tl.constexpr, BM: tl.constexpr):
    total = count_tiles(offsets, pixels, COLUMNS, CLASSES, BM)
    tl.store(out, total)
    for tile in range(0, total):
        found = find_tile(tile, offsets, pixels, COLUMNS, CLASSES, BM)
        for i in tl.static_range(6):
            tl.store(out + 1 + tile * 6 + i, found[i])


def schedule(levels, groups, shape, pixels, classes, rows):
    """(segment, start, stop, row, class, column) of every tile, in the order of the kernel."""
    route = as_route(levels, groups, len(levels))
    out = torch.zeros(1 + 6 * 4096, dtype=torch.int32)
    look_up[(1,)](out, route.offsets, pixels, shape.columns, classes, rows)
    total = int(out[0])
    return out[1 : 1 + 6 * total].view(total, 6).tolist(), route


@pytest.mark.parametrize("kind", LEVEL_KINDS)
@pytest.mark.parametrize("classes", [1, 4])
def test_every_tile_once_heavy_first(kind, classes):
    n, k, pixels, tile = Side(128, (32, 32, 64)), Side(48, ()), 49, Tile(64, 64, 32, 4, 3, 2)
    shape = choice.shape_of_levels(n, k, 3, 1, False, tile)
    levels = make_levels(kind, 11, 3)
    tiles, route = schedule(levels, 3, shape, pixels, classes, tile.rows)
    offsets = route.offsets.tolist()
    wanted = [
        [s, offsets[s], offsets[s + 1], row, cls, column]
        for s in range(3)
        for row in range(-(-(offsets[s + 1] - offsets[s]) * pixels // tile.rows))
        for cls in range(classes)
        for column in range(shape.columns[s])
    ]
    assert tiles == wanted


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256, 512])
def test_work_is_the_flops_of_the_levels_within_one_tile_per_level(width):
    """Out-elastic and in-elastic: the products of all tiles against those that the levels ask for."""
    groups, pixels, batch = 3, 64, 24
    sizes = (width // 4, width // 4, width // 2)
    levels = make_levels("uniform", batch, groups)
    widths = torch.tensor([0, width // 4, width // 2, width])
    tile = choice.choose_tile(width, width, torch.bfloat16, 90)
    for n, k in ((Side(width, sizes), Side(width, ())), (Side(width, ()), Side(width, sizes))):
        shape = choice.shape_of_levels(n, k, groups, 1, True, tile)
        tiles, _ = schedule(levels, groups, shape, pixels, 1, tile.rows)
        done = sum(tile.rows * shape.bns[r] * _steps(shape, s) for s, *_ in tiles for r in [shape.rung[s]])
        needed = int(widths[levels].sum()) * pixels * width
        padding = sum(tile.rows * shape.columns[s] * shape.bns[shape.rung[s]] * _steps(shape, s) for s in range(groups))
        least = 16 / min(16, width // 4)  # a matrix instruction has 16 columns and steps of 16
        assert needed <= done <= (needed + padding) * least


def _steps(shape, segment):
    bk = shape.bks[shape.rung[segment]]
    return -(-shape.k_widths[segment] // bk) * bk
