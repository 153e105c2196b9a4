"""The convolution kernel of Hopper for stride 1 and levels whose vertical taps share one load of the map, in Gluon.

    out[b, i, j, n] = sum over taps (r, s), channels k of  source[b, i + row(r), j + column(s), k] * weight[n, r, s, k]

A *strip* is ROWS rows of one map; a tile is as many strips side by side as make 64 pixels a row, of any instances of a
segment. Shared memory holds a row of all strips as a *block* of 64 pixels by BK channels, row after row, so that for a
column of taps and BK channels the rows of a tile and those around it are loaded once: row t of the result takes for tap
r the block that lies r * DIL_H further down. `wgmma` reads blocks where they lie, as its left operand, which Gluon can
say and Triton cannot. A level of few channels is then a narrow product.

One warp loads (strip_loads.py) and runs ahead, over tiles too; the others multiply and store. A stage of the ring is a
column of taps by BK channels: its blocks, and the weights of R taps. `full` says that a stage has landed, `empty` that
it may be loaded again. A stage has its place in memory whatever the rung, so that it never falls on another one that is
still read.

Segments, their tiles and the step behind the sums are those of conv_kernel.py.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .conv_kernel import count_tiles, find_tile, pick
from .store_kernel import store
from .strip_loads import find_turn, load_tiles, ring_views

meet = getattr(gl, "thread_barrier", None) or gl.barrier  # of the warps of one part


@gluon.jit
def _zeros(ROWS: gl.constexpr, BN: gl.constexpr):
    """Sums of a tile before its first product, [64, BN] for each of its rows, as `wgmma` holds them."""
    WARPS: gl.constexpr = gl.num_warps() // 4
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS], [16, BN // WARPS, 16])
    sums = ()
    for _ in gl.static_range(ROWS):
        sums += (gl.zeros([64, BN], gl.float32, SUMS),)
    return sums


@gluon.jit
def _multiply_tile(
    sums, ring, full, empty, stage, boxes, weights, turns,
    R: gl.constexpr, DIL_H: gl.constexpr, TRANSPOSED: gl.constexpr,
    ROWS: gl.constexpr, STRIPS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums with the products of a tile, and the next stage."""
    _, blocks, filters = ring_views(ring, boxes, weights, STRIPS, BK)
    AT_BLOCK: gl.constexpr = blocks.shape[0] // STAGES
    AT_TAP: gl.constexpr = filters.shape[0] // STAGES
    for _ in range(turns):
        place = stage % STAGES
        mbarrier.wait(full.index(place), stage // STAGES & 1)
        made = ()
        for t in gl.static_range(ROWS):
            acc = sums[t]
            for th in gl.static_range(R):
                down = t + ((R - 1 - th) * DIL_H if TRANSPOSED else th * DIL_H)
                taps = filters.index(place * AT_TAP + th)
                if not TRANSPOSED:
                    taps = taps.permute((1, 0))
                acc = warpgroup_mma(blocks.index(place * AT_BLOCK + down), taps, acc, is_async=True)
            made += (acc,)
        sums = warpgroup_mma_wait(0, deps=made)
        meet()  # all warps have read the stage
        mbarrier.arrive(empty.index(place), count=1)
        stage += 1
    return sums, stage


@gluon.jit
def _multiply_tiles(
    ring, full, empty, rungs, order, offsets, memory,
    OH: gl.constexpr, OW: gl.constexpr, R: gl.constexpr, S: gl.constexpr, DIL_H: gl.constexpr, TRANSPOSED: gl.constexpr,
    N_WIDTHS: gl.constexpr, K_WIDTHS: gl.constexpr, COLUMNS: gl.constexpr, RUNG: gl.constexpr,
    BNS: gl.constexpr, BKS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """The part of the warps that multiply and store: all tiles of this program.

    Where rungs are equally wide (ONE), the step behind the sums is compiled once.
    """
    ONE: gl.constexpr = BNS[0] == BNS[len(BNS) - 1]  # they come in descending width
    STRIPS: gl.constexpr = 64 // OW
    stage = 0
    total = count_tiles(offsets, OH * OW, COLUMNS, 1, 64 * ROWS)
    for turn in range(tl.cdiv(total, tl.num_programs(0))):
        tile = find_turn(turn)
        if tile < total:
            segment, start, stop, m_tile, _, n_tile = find_tile(tile, offsets, OH * OW, COLUMNS, 1, 64 * ROWS)
            n_width = pick(N_WIDTHS, segment)
            k_width = pick(K_WIDTHS, segment)
            rung = pick(RUNG, segment)
            if ONE:
                sums = _zeros(ROWS, BNS[0])
                for r in gl.static_range(len(BNS)):
                    if rung == r:
                        sums, stage = _multiply_tile(
                            sums, ring, full, empty, stage, rungs[2 * r], rungs[2 * r + 1], S * (k_width // BKS[r]),
                            R, DIL_H, TRANSPOSED, ROWS, STRIPS, BKS[r], STAGES,
                        )  # fmt: skip
                _store_tile(
                    sums, start, stop, m_tile, n_tile * BNS[0], n_width, k_width, order, memory,
                    OH, OW, ROWS, STRIPS, BNS[0], STEP,
                )  # fmt: skip
            else:
                for r in gl.static_range(len(BNS)):
                    if rung == r:
                        sums, stage = _multiply_tile(
                            _zeros(ROWS, BNS[r]), ring, full, empty, stage, rungs[2 * r], rungs[2 * r + 1],
                            S * (k_width // BKS[r]), R, DIL_H, TRANSPOSED, ROWS, STRIPS, BKS[r], STAGES,
                        )  # fmt: skip
                        _store_tile(
                            sums, start, stop, m_tile, n_tile * BNS[r], n_width, k_width, order, memory,
                            OH, OW, ROWS, STRIPS, BNS[r], STEP,
                        )  # fmt: skip


@gluon.jit
def _store_tile(
    sums, start, stop, m_tile, n_first, n_width, k_width, order, memory,
    OH: gl.constexpr, OW: gl.constexpr, ROWS: gl.constexpr, STRIPS: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    for t in gl.static_range(ROWS):
        _store_row(
            sums[t], t, start, stop, m_tile, n_first, n_width, k_width, order, memory, OH, OW, ROWS, STRIPS, BN, STEP
        )


@gluon.jit
def _store_row(
    acc, t, start, stop, m_tile, n_first, n_width, k_width, order, memory,
    OH: gl.constexpr, OW: gl.constexpr, ROWS: gl.constexpr, STRIPS: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Row t of all strips of a tile, through the step behind the sums."""
    (
        out, bias, scale_out, following, scale_next, shift_next, levels_next,
        shortcut, MAP_H, MAP_W, map_b, map_h, map_w, gate, gate_b, out_b, out_h, out_w,
    ) = memory  # fmt: skip
    BIAS: gl.constexpr = STEP[0]
    SCALE: gl.constexpr = STEP[1]
    ADD: gl.constexpr = STEP[2]
    RELU: gl.constexpr = STEP[3]
    NEXT: gl.constexpr = STEP[4]
    POOL: gl.constexpr = STEP[5]
    MAP_C: gl.constexpr = STEP[6]
    GATE: gl.constexpr = STEP[7]
    WIDE: gl.constexpr = BN // 8 if BN < 256 else 32
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [gl.num_warps(), 1], [1, 0])
    m = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    n = n_first + gl.arange(0, BN, gl.SliceLayout(0, FLAT))
    strip = m_tile * STRIPS + m // OW
    live = start + strip // (OH // ROWS) < stop
    instance = gl.load(order + start + strip // (OH // ROWS), mask=live, other=0)
    i = strip % (OH // ROWS) * ROWS + t
    j = m % OW
    at = instance.to(gl.int64) * out_b + i * out_h + j * out_w
    idle = 0
    if NEXT or POOL > 0:
        idle = (k_width == 0).to(gl.int32)
    store(
        gl.convert_layout(acc, FLAT), out, bias, scale_out, following, scale_next, shift_next, levels_next,
        shortcut, MAP_H, MAP_W, map_b, map_h, map_w, i, j, gate, gate_b,
        at, instance, live, idle, n, n < n_width, BIAS, SCALE, ADD, RELU, NEXT, POOL, MAP_C, GATE,
    )  # fmt: skip


# What depends on the batch and on where the rows of its plan lie is not compiled in.
@gluon.jit(do_not_specialize_on_alignment=["order", "offsets", "levels_next"])
def strip_kernel(
    boxes_0, boxes_1, boxes_2,  # descriptors of source [B, H, W, KC] in boxes [1, 1, OW, BK], one for each rung
    weights_0, weights_1, weights_2,  # descriptors of [out, R * S * in] in boxes [BN, BK], TRANSPOSED [BK, BN]
    out,  # [B, OH, OW, NC], strides out_b, out_h, out_w, 1
    bias, scale_out,  # per channel
    following, scale_next, shift_next, levels_next,  # a second output with out's strides, its affine map, its route
    shortcut,  # [B, MAP_H, MAP_W, MAP_C], strides map_b, map_h, map_w, 1: a map that is pooled and added
    gate,  # [B], stride gate_b
    order, offsets,  # of the route
    out_b, out_h, out_w, MAP_H, MAP_W, map_b, map_h, map_w, gate_b,
    OH: gl.constexpr, OW: gl.constexpr, NC: gl.constexpr, IN: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
    PAD_H: gl.constexpr, PAD_W: gl.constexpr, DIL_H: gl.constexpr, DIL_W: gl.constexpr, TRANSPOSED: gl.constexpr,
    N_WIDTHS: gl.constexpr, K_WIDTHS: gl.constexpr, COLUMNS: gl.constexpr, RUNG: gl.constexpr,  # of each segment
    BNS: gl.constexpr, BKS: gl.constexpr,  # of each rung
    BIAS: gl.constexpr, SCALE: gl.constexpr, ADD: gl.constexpr, RELU: gl.constexpr,
    NEXT: gl.constexpr, POOL: gl.constexpr, MAP_C: gl.constexpr, GATE: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr, MOST_N: gl.constexpr, MOST_K: gl.constexpr,  # the largest of rungs
):  # fmt: skip
    DTYPE: gl.constexpr = boxes_0.dtype
    LOADED: gl.constexpr = ROWS + (R - 1) * DIL_H
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, MOST_K], DTYPE)
    pixels = gl.allocate_shared_memory(DTYPE, [STAGES * LOADED, 64, MOST_K], FLAT)
    filters = gl.allocate_shared_memory(DTYPE, [STAGES * R * MOST_N // 16, 16, MOST_K], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    ring = (pixels, filters)
    rungs = (boxes_0, weights_0)
    if len(BNS) > 1:
        rungs = (boxes_0, weights_0, boxes_1, weights_1)
    if len(BNS) > 2:
        rungs = (boxes_0, weights_0, boxes_1, weights_1, boxes_2, weights_2)
    memory = (
        out, bias, scale_out, following, scale_next, shift_next, levels_next,
        shortcut, MAP_H, MAP_W, map_b, map_h, map_w, gate, gate_b, out_b, out_h, out_w,
    )  # fmt: skip
    STEP: gl.constexpr = (BIAS, SCALE, ADD, RELU, NEXT, POOL, MAP_C, GATE)
    LOADER: gl.constexpr = 40  # registers of a thread of the warp that loads
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    ring, full, empty, rungs, order, offsets, memory, OH, OW, R, S, DIL_H, TRANSPOSED,
                    N_WIDTHS, K_WIDTHS, COLUMNS, RUNG, BNS, BKS, ROWS, STAGES, STEP,
                ),
            ),
            (
                load_tiles,
                (
                    ring, full, empty, rungs, order, offsets, OH, OW, IN, R, S, PAD_H, PAD_W, DIL_H, DIL_W,
                    TRANSPOSED, K_WIDTHS, COLUMNS, RUNG, BNS, BKS, ROWS, STAGES,
                ),
            ),
        ],
        [1],  # warps
        [LOADER],
    )  # fmt: skip
