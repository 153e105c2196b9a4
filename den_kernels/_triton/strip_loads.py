"""The part of the convolution on strips (strip_kernel.py) that loads, and the ring through which it hands stages on."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .conv_kernel import count_tiles, find_tile, pick


@triton.jit
def find_turn(turn):
    """The tile of this program's turn. Every other round goes backward, so that no program gets only heavy ones."""
    programs = tl.num_programs(0)
    place = tl.program_id(0)
    return turn * programs + tl.where(turn % 2 == 0, place, programs - 1 - place)


@gluon.jit
def ring_views(ring, boxes, weights, STRIPS: gl.constexpr, BK: gl.constexpr):
    """The ring as a rung sees it: rows of strips [1, 1, OW, BK], blocks [64, BK], weights of taps."""
    pixels = ring[0]
    filters = ring[1]
    DTYPE: gl.constexpr = pixels.dtype
    COUNT: gl.constexpr = pixels.numel // (64 * BK)
    SIDES: gl.constexpr = weights.block_shape
    TAPS: gl.constexpr = filters.numel // (SIDES[0] * SIDES[1])
    rows = pixels._reinterpret(DTYPE, [COUNT * STRIPS, 1, 1, 64 // STRIPS, BK], boxes.layout)
    blocks = pixels._reinterpret(DTYPE, [COUNT, 64, BK], gl.NVMMASharedLayout.get_default_for([64, BK], DTYPE))
    return rows, blocks, filters._reinterpret(DTYPE, [TAPS, SIDES[0], SIDES[1]], weights.layout)


@gluon.jit
def _load_tile(
    ring, full, empty, stage, boxes, weights, order, start, stop, m_tile, n_first, k_steps,
    PER_MAP: gl.constexpr, IN: gl.constexpr, R: gl.constexpr, S: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr, TRANSPOSED: gl.constexpr,
    ROWS: gl.constexpr, STRIPS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads the stages of a tile as they become free; returns the next stage, counted from the first of all."""
    rows, _, filters = ring_views(ring, boxes, weights, STRIPS, BK)
    LOADED: gl.constexpr = ROWS + (R - 1) * DIL_H
    BYTES: gl.constexpr = 2 * (LOADED * 64 * BK + R * weights.block_shape[0] * weights.block_shape[1])
    AT_ROW: gl.constexpr = rows.shape[0] // STAGES
    AT_TAP: gl.constexpr = filters.shape[0] // STAGES
    instances = ()
    tops = ()
    for s in gl.static_range(STRIPS):
        strip = m_tile * STRIPS + s
        instances += (gl.load(order + gl.minimum(start + strip // PER_MAP, stop - 1)),)
        top = strip % PER_MAP * ROWS
        tops += (top + PAD_H - (R - 1) * DIL_H if TRANSPOSED else top - PAD_H,)
    for turn in range(S * k_steps):
        tw = turn // k_steps
        k = turn % k_steps * BK
        place = stage % STAGES
        mbarrier.wait(empty.index(place), (stage // STAGES & 1) ^ 1)
        landed = full.index(place)
        mbarrier.expect(landed, BYTES)
        column = PAD_W - tw * DIL_W if TRANSPOSED else tw * DIL_W - PAD_W
        for row in range(LOADED):
            for s in gl.static_range(STRIPS):
                to = rows.index(place * AT_ROW + row * STRIPS + s)
                tma.async_copy_global_to_shared(boxes, [instances[s], tops[s] + row, column, k], landed, to)
        for th in gl.static_range(R):
            to = filters.index(place * AT_TAP + th)
            if TRANSPOSED:
                tma.async_copy_global_to_shared(weights, [k, (th * S + tw) * IN + n_first], landed, to)
            else:
                tma.async_copy_global_to_shared(weights, [n_first, (th * S + tw) * IN + k], landed, to)
        stage += 1
    return stage


@gluon.jit
def load_tiles(
    ring, full, empty, rungs, order, offsets,
    OH: gl.constexpr, OW: gl.constexpr, IN: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
    PAD_H: gl.constexpr, PAD_W: gl.constexpr, DIL_H: gl.constexpr, DIL_W: gl.constexpr, TRANSPOSED: gl.constexpr,
    K_WIDTHS: gl.constexpr, COLUMNS: gl.constexpr, RUNG: gl.constexpr, BNS: gl.constexpr, BKS: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The part of the warp that loads: all tiles of this program."""
    STRIPS: gl.constexpr = 64 // OW
    stage = 0
    total = count_tiles(offsets, OH * OW, COLUMNS, 1, 64 * ROWS)
    for turn in range(tl.cdiv(total, tl.num_programs(0))):
        tile = find_turn(turn)
        if tile < total:
            segment, start, stop, m_tile, _, n_tile = find_tile(tile, offsets, OH * OW, COLUMNS, 1, 64 * ROWS)
            k_width = pick(K_WIDTHS, segment)
            rung = pick(RUNG, segment)
            for r in gl.static_range(len(BNS)):
                if rung == r:
                    stage = _load_tile(
                        ring, full, empty, stage, rungs[2 * r], rungs[2 * r + 1], order, start, stop, m_tile,
                        n_tile * BNS[r], k_width // BKS[r], OH // ROWS, IN, R, S, PAD_H, PAD_W, DIL_H, DIL_W,
                        TRANSPOSED, ROWS, STRIPS, BKS[r], STAGES,
                    )  # fmt: skip
