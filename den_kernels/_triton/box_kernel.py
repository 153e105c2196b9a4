"""The convolution kernel of Hopper and later for stride 1 and levels: the chip's copy engine loads tiles as boxes.

    out[b, i, j, n] = sum over taps (r, s), channels k of  source[b, i + row(r), j + column(s), k] * weight[n, r, s, k]

A tile is ROWS whole rows of one instance. For a tap, its operand is a box [1, ROWS, OW, BK] of the source, shifted by
the tap: a tensor descriptor gives zeros for what lies outside the map, so there is no mask and no address to compute,
and one thread issues the copy (UTMALDG). The product is turned, [channels, pixels] += weight * box^T, because the right
operand of `wgmma` is always read from shared memory: as the left one Triton 3.6 takes a box, whose rows it has to join,
through registers, which the loop then writes to while a product in flight still reads them.

Segments, their tiles and the step behind the sums are those of conv_kernel.py.
"""

import triton
import triton.language as tl

from .conv_kernel import count_tiles, find_tile, pick
from .store_kernel import store


@triton.jit
def _multiply_boxes(
    boxes, weights, instance, top, n_first, k_steps,
    IN: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The products of a tile, turned: [BN, BM], summed over taps and channels in one loop."""
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    th = 0
    tw = 0
    step = 0
    for _ in range(0, R * S * k_steps):
        if TRANSPOSED:
            box = boxes.load([instance, top + PAD_H - th * DIL_H, PAD_W - tw * DIL_W, step * BK])
            w = weights.load([step * BK, (th * S + tw) * IN + n_first]).T
        else:
            box = boxes.load([instance, top + th * DIL_H - PAD_H, tw * DIL_W - PAD_W, step * BK])
            w = weights.load([n_first, (th * S + tw) * IN + step * BK])
        acc = tl.dot(w, box.reshape(BM, BK).T, acc)
        step += 1
        turn = step == k_steps
        step = tl.where(turn, 0, step)
        tw = tl.where(turn, tw + 1, tw)
        turn = tw == S
        tw = tl.where(turn, 0, tw)
        th = tl.where(turn, th + 1, th)
    return acc


# What depends on the batch and on where the rows of its plan lie is not compiled in.
@triton.jit(do_not_specialize_on_alignment=["order", "offsets", "levels_next"])
def box_kernel(
    boxes_0, boxes_1, boxes_2,  # descriptors of source [B, H, W, KC] in boxes [1, ROWS, OW, BK], one for each rung
    weights_0, weights_1, weights_2,  # descriptors of [out, R * S * in] in boxes [BN, BK], TRANSPOSED [BK, BN]
    out,  # [B, OH, OW, NC], strides out_b, out_h, out_w, 1
    bias, scale_out,  # per channel
    following, scale_next, shift_next, levels_next,  # a second output with out's strides, its affine map, its route
    shortcut,  # [B, MAP_H, MAP_W, MAP_C], strides map_b, map_h, map_w, 1: a map that is pooled and added
    gate,  # [B], stride gate_b
    order, offsets,  # of the route
    OH, out_b, out_h, out_w, MAP_H, MAP_W, map_b, map_h, map_w, gate_b,
    OW: tl.constexpr, NC: tl.constexpr, IN: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    N_WIDTHS: tl.constexpr, K_WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, RUNG: tl.constexpr,  # of each segment
    BNS: tl.constexpr, BKS: tl.constexpr,  # of each rung
    BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr,
    NEXT: tl.constexpr, POOL: tl.constexpr, MAP_C: tl.constexpr, GATE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BM // OW
    total = count_tiles(offsets, OH * OW, COLUMNS, 1, BM)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        segment, start, _, m_tile, _, n_tile = find_tile(tile, offsets, OH * OW, COLUMNS, 1, BM)
        instance = tl.load(order + start + m_tile // (OH // ROWS))
        top = m_tile % (OH // ROWS) * ROWS
        n_width = pick(N_WIDTHS, segment)
        k_width = pick(K_WIDTHS, segment)
        rung = pick(RUNG, segment)
        for r in tl.static_range(len(BNS)):
            if rung == r:
                BN: tl.constexpr = BNS[r]
                BK: tl.constexpr = BKS[r]
                if r == 0:
                    boxes, weights = boxes_0, weights_0
                elif r == 1:
                    boxes, weights = boxes_1, weights_1
                else:
                    boxes, weights = boxes_2, weights_2
                acc = _multiply_boxes(
                    boxes, weights, instance, top, n_tile * BN, k_width // BK,
                    IN, R, S, PAD_H, PAD_W, DIL_H, DIL_W, TRANSPOSED, BM, BN, BK,
                )  # fmt: skip
                m = tl.arange(0, BM)
                i = top + m // OW
                j = m % OW
                n = n_tile * BN + tl.arange(0, BN)
                place = tl.zeros((BM,), tl.int32) + instance
                at = instance.to(tl.int64) * out_b + i * out_h + j * out_w
                idle = 0
                if NEXT or POOL > 0:
                    idle = (k_width == 0).to(tl.int32)
                store(
                    acc.T, out, bias, scale_out, following, scale_next, shift_next, levels_next,
                    shortcut, MAP_H, MAP_W, map_b, map_h, map_w, i, j, gate, gate_b,
                    at, place, i < OH, idle, n, n < n_width, BIAS, SCALE, ADD, RELU, NEXT, POOL, MAP_C, GATE,
                )  # fmt: skip
