"""The weight gradient of a dynamic convolution: a GEMM whose reduction runs over the instances that used the weight.

    dweight[n, r, s, k] = sum over instances b that use n and k, over pixels p:  grad[b, p, n] * source[b, p at r, s, k]

A tile is BN output channels times BK input channels of one tap, over one of `splits` shares of the pixels; the shares
are added up afterwards in a fixed order, so the result does not depend on how programs are scheduled.

- levels: the instances that use a tile's first channels are the first of `order`; how many, the offsets of the route
  say. Where a group ends inside a tile (WIDE), an instance's loads end at the width of its level.
- masks (LISTS): each unit of channels on one side has a list of its instances in `order` [units, B], of `counts`. What
  the lists do not settle is masked channel by channel (BITS).
"""

import triton
import triton.language as tl


@triton.jit
def _users(offsets, n_first, k_first, N_WIDTHS: tl.constexpr, K_WIDTHS: tl.constexpr):
    """The number of instances, the first of the order, that write channel n_first and read channel k_first."""
    users = 0
    for s in tl.static_range(len(N_WIDTHS)):
        uses = (N_WIDTHS[s] > n_first) & (K_WIDTHS[s] > k_first)
        users = tl.where(uses, tl.load(offsets + s + 1), users)
    return users


@triton.jit
def _widths(offsets, position, WIDTHS: tl.constexpr):
    """The channels that the instances at these places of the order keep; WIDTHS are those of levels G, ..., 1, 0.

    From the offsets, which do not change in the loop: a level read there would hold up the copy that needs it.
    """
    width = tl.zeros_like(position) + WIDTHS[0]
    for s in tl.static_range(1, len(WIDTHS)):
        width = tl.where(position >= tl.load(offsets + s), WIDTHS[s], width)
    return width


@triton.jit
def _reduce(
    grad, source, order, offsets, users, bits_n, bits_k, n, k, n_ok, k_ok, split, off_h, off_w,
    H, W, OH, OW, grad_b, grad_h, grad_w, source_b, source_h, source_w,
    NC: tl.constexpr, KC: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    N_WIDTHS: tl.constexpr, K_WIDTHS: tl.constexpr, N_WIDE: tl.constexpr, K_WIDE: tl.constexpr,
    N_BITS: tl.constexpr, K_BITS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    splits, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    pixels = OH * OW
    share = tl.cdiv(tl.cdiv(users * pixels, BP), splits) * BP
    first = split * share
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for start in range(first, tl.minimum(first + share, users * pixels), BP):
        m = start + tl.arange(0, BP)
        live = m < users * pixels
        if WHOLE:  # all of one instance: BP divides its pixels
            position = start // pixels + tl.zeros((BP,), tl.int32)
            instance = (tl.load(order + start // pixels) + tl.zeros((BP,), tl.int32)).to(tl.int64)
            pixel = start % pixels + tl.arange(0, BP)
        else:
            position = m // pixels
            instance = tl.load(order + position, mask=live, other=0).to(tl.int64)
            pixel = m % pixels
        i = pixel // OW
        j = pixel % OW
        h = i * STRIDE_H + off_h
        w = j * STRIDE_W + off_w
        inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        g_ok = live[None, :] & n_ok[:, None]
        a_ok = inside[:, None] & k_ok[None, :]
        if N_WIDE:
            g_ok = g_ok & (n[:, None] < _widths(offsets, position, N_WIDTHS)[None, :])
        if K_WIDE:
            a_ok = a_ok & (k[None, :] < _widths(offsets, position, K_WIDTHS)[:, None])
        if N_BITS:
            g_ok = g_ok & (tl.load(bits_n + instance[None, :] * NC + n[:, None], mask=g_ok, other=0) != 0)
        if K_BITS:
            a_ok = a_ok & (tl.load(bits_k + instance[:, None] * KC + k[None, :], mask=a_ok, other=0) != 0)
        g = tl.load(grad + (instance * grad_b + i * grad_h + j * grad_w)[None, :] + n[:, None], mask=g_ok, other=0.0)
        at = instance * source_b + h * source_h + w * source_w
        a = tl.load(source + at[:, None] + k[None, :], mask=a_ok, other=0.0)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
    return acc


# What depends on the batch and on where the rows of its plan lie is not compiled in.
@triton.jit(do_not_specialize=["B", "splits"], do_not_specialize_on_alignment=["order", "offsets", "counts"])
def weight_gradient_kernel(
    grad,  # [B, OH, OW, NC], strides grad_b, grad_h, grad_w, 1
    source,  # [B, H, W, KC], strides source_b, source_h, source_w, 1
    partial,  # float32 [splits, NC, R, S, KC / CARDINALITY]
    order, offsets, counts, bits_n, bits_k,
    B, H, W, OH, OW, grad_b, grad_h, grad_w, source_b, source_h, source_w,
    NC: tl.constexpr, KC: tl.constexpr, CARDINALITY: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    N_WIDTHS: tl.constexpr, K_WIDTHS: tl.constexpr, K_TILES: tl.constexpr,
    LISTS: tl.constexpr,  # "" for levels, "n" or "k": the side whose units have lists of instances
    N_WIDE: tl.constexpr, K_WIDE: tl.constexpr, N_BITS: tl.constexpr, K_BITS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    splits, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    NG: tl.constexpr = NC // CARDINALITY
    KG: tl.constexpr = KC // CARDINALITY
    total = tl.cdiv(NC, BN) * (K_TILES * R * S * splits)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        tap = tile % (R * S)
        k_tile = tile // (R * S) % K_TILES
        split = tile // (R * S * K_TILES) % splits
        n_tile = tile // (R * S * K_TILES * splits)
        n_first = n_tile * BN
        k_first = n_first // NG * KG + k_tile * BK
        k_end = (tl.minimum(n_first + BN, NC) - 1) // NG * KG + KG
        n = n_first + tl.arange(0, BN)
        k = k_first + tl.arange(0, BK)
        if LISTS == "n":
            users = tl.load(counts + n_tile)
            instances = order + n_tile * B
        elif LISTS == "k":
            users = tl.load(counts + k_tile, mask=k_first < k_end, other=0)
            instances = order + k_tile * B
        else:
            users = _users(offsets, n_first, k_first, N_WIDTHS, K_WIDTHS)
            instances = order
        n_ok = n < NC
        k_ok = k < k_end
        acc = _reduce(
            grad, source, instances, offsets, users, bits_n, bits_k, n, k, n_ok, k_ok, split,
            tap // S * DIL_H - PAD_H, tap % S * DIL_W - PAD_W,
            H, W, OH, OW, grad_b, grad_h, grad_w, source_b, source_h, source_w,
            NC, KC, STRIDE_H, STRIDE_W, N_WIDTHS, K_WIDTHS, N_WIDE, K_WIDE,
            N_BITS, K_BITS, WHOLE, PRECISION, splits, BN, BK, BP,
        )  # fmt: skip
        at = partial + split.to(tl.int64) * (NC * R * S * KG) + tap * KG
        ok = n_ok[:, None] & k_ok[None, :]
        if CARDINALITY > 1:
            ok = ok & ((k // KG)[None, :] == (n // NG)[:, None])
        tl.store(at + n[:, None] * (R * S * KG) + (k % KG)[None, :], acc, mask=ok)
