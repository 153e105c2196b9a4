"""The convolution kernel: implicit GEMM over the selected channel groups of every instance, in one launch.

    out[b, i, j, n] = sum over taps (r, s) and channels k of  source[b, row(i, r), column(j, s), k] * weight[n, r, s, k]

Maps are channels-last. Rows of the GEMM are pixels of instances in the order of the route, columns are the NC channels
that are written, and the loop runs over taps and the KC channels that are read. A forward convolution and its data
gradient are the same kernel: with TRANSPOSED the columns are input channels, the loop runs over output channels, and
the pixels of the result fall into STRIDE_H * STRIDE_W *classes* by their row and column modulo the stride, because
only every STRIDE-th tap meets a class.

Work is a list of tiles that every program reads off the route itself:

- levels: the instances of a segment stand next to each other in `order`, so a segment is one GEMM whose sides are the
  widths of its level. Segments come in descending level, so heavy tiles go first; a level that writes no channel has
  no tile. A segment runs on its *rung*: a tile shape that fits its widths.
- masks: a tile lies within one instance. Where the groups allow it, its columns and its K steps follow a list of the
  *units* (BN or BK channels) that the instance selected; else the loads are masked channel by channel.

Nothing is calculated between a load and the product: what would be must lie in registers, and on Hopper the loop then
writes to registers that a product in flight still reads (Triton 3.6 and 3.7). Activations are in the map already.
"""

import triton
import triton.language as tl

from .store_kernel import store

# How a side of the GEMM follows a mask.
ALL = 0  # it does not: every channel
BITS = 1  # bool per channel
UNITS = 2  # list of units


@triton.jit
def pick(values: tl.constexpr, index):
    """values[index] of a tuple of constants, in a form that shows the compiler their common divisors."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def count_tiles(offsets, pixels, COLUMNS: tl.constexpr, CLASSES: tl.constexpr, BM: tl.constexpr):
    """Tiles of all segments: COLUMNS are the column tiles of each, `pixels` those of one class of one instance."""
    total = 0
    for s in tl.static_range(len(COLUMNS)):
        instances = tl.load(offsets + s + 1) - tl.load(offsets + s)
        total += tl.cdiv(instances * pixels, BM) * (CLASSES * COLUMNS[s])
    return total


@triton.jit
def find_tile(tile, offsets, pixels, COLUMNS: tl.constexpr, CLASSES: tl.constexpr, BM: tl.constexpr):
    """The segment of a tile, the places in `order` where that starts and ends, and the tile's row, class and column."""
    begin = 0
    segment = 0
    start = 0
    stop = 0
    local = 0
    first = tl.load(offsets)
    for s in tl.static_range(len(COLUMNS)):
        last = tl.load(offsets + s + 1)
        tiles = tl.cdiv((last - first) * pixels, BM) * (CLASSES * COLUMNS[s])
        here = (tile >= begin) & (tile < begin + tiles)
        segment = tl.where(here, s, segment)
        start = tl.where(here, first, start)
        stop = tl.where(here, last, stop)
        local = tl.where(here, tile - begin, local)
        begin += tiles
        first = last
    columns = tl.maximum(pick(COLUMNS, segment), 1)
    pair = local // columns
    return segment, start, stop, pair // CLASSES, pair % CLASSES, local % columns


@triton.jit
def first_tap(remainder, PAD: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, SIDE: tl.constexpr):
    """The first tap that meets result rows of this remainder modulo the stride, or SIDE."""
    first = SIDE
    for t in tl.static_range(STRIDE):
        tap = STRIDE - 1 - t
        meets = (remainder + PAD + STRIDE * SIDE * DIL - tap * DIL) % STRIDE == 0
        first = tl.where(meets, tap, first)
    return tl.minimum(first, SIDE)


@triton.jit
def tap_range(
    remainder, PAD: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, SKIP: tl.constexpr, SIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The first tap, the number of taps and the offset of the first one's source row, on one axis."""
    if TRANSPOSED:
        tap = first_tap(remainder, PAD, DIL, STRIDE, SIDE)
        return tap, tl.cdiv(SIDE - tap, SKIP), (remainder + PAD - tap * DIL) // STRIDE
    else:
        return 0, SIDE, -PAD


@triton.jit
def _multiply(
    source, weight, units, bits,
    base, row, column, live, n, n_first, k_width, k_steps,
    tap_h, tap_w, taps_h, taps_w, off_h, off_w, H, W, source_h, source_w,
    NC: tl.constexpr, KC: tl.constexpr, CARDINALITY: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, SKIP_H: tl.constexpr, SKIP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, K_MASK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The products of a tile [BM, BN], summed over taps and channels in one loop that is pipelined as a whole."""
    NG: tl.constexpr = NC // CARDINALITY
    KG: tl.constexpr = KC // CARDINALITY
    IN: tl.constexpr = NG if TRANSPOSED else KG  # weights are [out, R, S, IN] in memory
    k_first = 0
    if CARDINALITY > 1:  # the channels of the cardinality groups that these columns belong to
        k_first = n_first // NG * KG
        k_width = tl.minimum(k_width, (tl.minimum(n_first + BN, NC) - 1) // NG * KG + KG)
        k_steps = tl.cdiv(tl.maximum(k_width - k_first, 0), BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, taps_h * taps_w * k_steps):
        tap = i // k_steps
        step = i % k_steps
        th = tap // taps_w
        tw = tap % taps_w
        h = row + (off_h + th * STEP_H)
        w = column + (off_w + tw * STEP_W)
        inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        if K_MASK == 2:
            k = tl.multiple_of(tl.load(units + step) * BK, BK) + tl.arange(0, BK)
        else:
            k = k_first + step * BK + tl.arange(0, BK)
        k_ok = k < KC
        if not EVEN:
            k_ok = k < k_width
        if K_MASK == 1:
            k_ok = k_ok & (tl.load(bits + k, mask=k_ok, other=0) != 0)
        a_ok = inside[:, None]
        w_ok = (n < NC)[None, :]
        if not EVEN or K_MASK == 1:
            a_ok = a_ok & k_ok[None, :]
            w_ok = w_ok & k_ok[:, None]
        a = tl.load(source + (base + h * source_h + w * source_w)[:, None] + k[None, :], mask=a_ok, other=0.0)
        place = ((tap_h + th * SKIP_H) * S + tap_w + tw * SKIP_W) * IN
        if TRANSPOSED:
            place += n[None, :] + k[:, None] * (R * S * IN)
        else:
            place += n[None, :] * (R * S * IN) + k[:, None]
        if CARDINALITY > 1:
            group = (k // KG)[:, None]
            w_ok = w_ok & (group == (n // NG)[None, :])
            place -= group * IN
        b = tl.load(weight + place, mask=w_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _find_pixels(
    tile, order, offsets, pixels, MASKED: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr, BM: tl.constexpr
):
    """A tile's segment, its instance (with masks), instance and pixel of each row and whether it is one, class, column.

    With masks a tile lies within one instance, `place`, which levels leave at 0.
    """
    if MASKED:
        n_tile = tile % COLUMNS[0]
        pair = tile // COLUMNS[0]
        cls = pair % CLASSES
        m_tile = pair // CLASSES % tl.cdiv(pixels, BM)
        place = tl.load(order + pair // CLASSES // tl.cdiv(pixels, BM))
        pixel = m_tile * BM + tl.arange(0, BM)
        live = pixel < pixels
        instance = tl.zeros((BM,), tl.int32) + place
        segment = 0
    else:
        segment, start, stop, m_tile, cls, n_tile = find_tile(tile, offsets, pixels, COLUMNS, CLASSES, BM)
        m = m_tile * BM + tl.arange(0, BM)
        live = m < (stop - start) * pixels
        pixel = m % pixels
        place = 0
        instance = tl.load(order + start + m // pixels, mask=live, other=0)
    return segment, place, instance, pixel, live, cls, n_tile


@triton.jit
def _find_channels(
    place, n_tile, n_width, k_width, levels, units_n, counts_n, counts_k,
    MASKED: tl.constexpr, N_MASK: tl.constexpr, K_MASK: tl.constexpr, SKIP_EMPTY: tl.constexpr,
    COLUMNS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """True where a tile has channels to write; the first of these; and the steps of a tap."""
    k_steps = tl.cdiv(k_width, BK)
    n_first = n_tile * BN
    wanted = n_first < n_width
    if MASKED and SKIP_EMPTY:
        wanted = wanted & (tl.load(levels + place) > 0)
    if K_MASK == 2:
        k_steps = tl.load(counts_k + place)
    if N_MASK == 2:
        wanted = wanted & (n_tile < tl.load(counts_n + place))
        n_first = tl.load(units_n + place * COLUMNS[0] + n_tile, mask=wanted, other=0) * BN
    return wanted, n_first, k_steps


# What depends on the batch and on where the rows of its plan lie is not compiled in.
@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["levels", "order", "offsets", "levels_next"])
def convolve_kernel(
    source,  # [B, H, W, KC], strides source_b, source_h, source_w, 1
    weight,  # [out channels, R, S, in channels / CARDINALITY]
    out,  # [B, OH, OW, NC], strides out_b, out_h, out_w, 1
    bias, scale_out,  # per channel
    following, scale_next, shift_next, levels_next,  # a second output with out's strides, its affine map, its route
    shortcut,  # [B, MAP_H, MAP_W, MAP_C], strides map_b, map_h, map_w, 1: a map that is pooled and added
    gate,  # [B], stride gate_b
    levels, order, offsets,  # of the route; with masks the offsets are not read
    units_n, counts_n, bits_n, units_k, counts_k, bits_k,  # of masks: [B, units], [B], [B, channels] on each side
    B, H, W, OH, OW, source_b, source_h, source_w, out_b, out_h, out_w, MAP_H, MAP_W, map_b, map_h, map_w, gate_b,
    NC: tl.constexpr, KC: tl.constexpr, CARDINALITY: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, SKIP_H: tl.constexpr, SKIP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    N_WIDTHS: tl.constexpr, K_WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, RUNG: tl.constexpr,  # of each segment
    BNS: tl.constexpr, BKS: tl.constexpr, EVENS: tl.constexpr,  # of each rung
    MASKED: tl.constexpr, N_MASK: tl.constexpr, K_MASK: tl.constexpr, SKIP_EMPTY: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr,
    NEXT: tl.constexpr, POOL: tl.constexpr, MAP_C: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    GRID_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    GRID_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    rows = tl.cdiv(OH, GRID_H)
    columns = tl.cdiv(OW, GRID_W)
    pixels = rows * columns
    if MASKED:
        total = B * tl.cdiv(pixels, BM) * (CLASSES * COLUMNS[0])
    else:
        total = count_tiles(offsets, pixels, COLUMNS, CLASSES, BM)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        segment, place, instance, pixel, live, cls, n_tile = _find_pixels(
            tile, order, offsets, pixels, MASKED, COLUMNS, CLASSES, BM
        )
        i = pixel // columns
        j = pixel % columns
        tap_h, taps_h, off_h = tap_range(cls // GRID_W, PAD_H, DIL_H, STRIDE_H, SKIP_H, R, TRANSPOSED)
        tap_w, taps_w, off_w = tap_range(cls % GRID_W, PAD_W, DIL_W, STRIDE_W, SKIP_W, S, TRANSPOSED)
        out_row = i * GRID_H + cls // GRID_W
        out_column = j * GRID_W + cls % GRID_W
        live = live & (out_row < OH) & (out_column < OW)
        base = instance.to(tl.int64) * source_b
        at = instance.to(tl.int64) * out_b + out_row * out_h + out_column * out_w
        STEP_H: tl.constexpr = -(SKIP_H * DIL_H // STRIDE_H) if TRANSPOSED else DIL_H
        STEP_W: tl.constexpr = -(SKIP_W * DIL_W // STRIDE_W) if TRANSPOSED else DIL_W
        row = i if TRANSPOSED else i * STRIDE_H
        column = j if TRANSPOSED else j * STRIDE_W
        n_width = pick(N_WIDTHS, segment)
        k_width = pick(K_WIDTHS, segment)
        rung = pick(RUNG, segment)
        for r in tl.static_range(len(BNS)):
            if rung == r:
                BN: tl.constexpr = BNS[r]
                BK: tl.constexpr = BKS[r]
                wanted, n_first, k_steps = _find_channels(
                    place, n_tile, n_width, k_width, levels, units_n, counts_n, counts_k,
                    MASKED, N_MASK, K_MASK, SKIP_EMPTY, COLUMNS, BN, BK,
                )  # fmt: skip
                if wanted:
                    n = n_first + tl.arange(0, BN)
                    n_ok = n < n_width
                    if N_MASK == 1:
                        n_ok = n_ok & (tl.load(bits_n + place * NC + n, mask=n_ok, other=0) != 0)
                    acc = _multiply(
                        source, weight, units_k + place * (KC // BK), bits_k + place * KC,
                        base, row, column, live, n, n_first, k_width, k_steps,
                        tap_h, tap_w, taps_h, taps_w, off_h, off_w, H, W, source_h, source_w,
                        NC, KC, CARDINALITY, R, S, STEP_H, STEP_W, SKIP_H, SKIP_W, TRANSPOSED,
                        K_MASK, EVENS[r], PRECISION, BM, BN, BK,
                    )  # fmt: skip
                    idle = 0
                    if NEXT or POOL > 0:
                        idle = (tl.load(levels + place) == 0).to(tl.int32) if MASKED else (k_width == 0).to(tl.int32)
                    store(
                        acc, out, bias, scale_out, following, scale_next, shift_next, levels_next,
                        shortcut, MAP_H, MAP_W, map_b, map_h, map_w, out_row, out_column, gate, gate_b,
                        at, instance, live, idle, n, n_ok, BIAS, SCALE, ADD, RELU, NEXT, POOL, MAP_C, GATE,
                    )  # fmt: skip
