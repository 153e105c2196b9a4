"""The four passes of a batch norm over the channels that each instance uses, the fold of the first one's parts, and two
passes of a folded norm at inference.

A program owns a block of BC channels and walks every shares-th tile of BR pixels of one instance. A tile whose channels
the instance does not use is not read. Every share leaves its part of a sum in its own row of `partial`, and the rows
are added up in a fixed order, so the result does not depend on how programs are scheduled.

    statistics  x -> count, mean and squares about the mean of each share;  fold  those -> mean, variance, count
    apply       x -> y = relu((x - mean) * scale + shift), scale = weight / sqrt(variance + EPS)
    reduce      dy, x -> sum of g and of g * xhat of each share, g = dy where y > 0, xhat = (x - mean) / sqrt(...)
    gradient    dy, x -> dx = scale * (g - sum of g / count - xhat * sum of g * xhat / count), or scale * g
    activate    x -> y = relu(x * scale + shift) of the instances above level 0
    pool        x -> y = the mean of relu(x * scale + shift) over an instance's pixels

Moments are joined as Chan, Golub and LeVeque (1979) do: a common offset of the values does not cancel.
"""

import triton
import triton.language as tl

# What depends on the batch and on where the rows of its plan lie is not compiled in.
_OF_THE_BATCH = {"do_not_specialize": ["B", "shares"], "do_not_specialize_on_alignment": ["selection"]}


@triton.jit
def _block(C: tl.constexpr, ENDS: tl.constexpr, UNIFORM: tl.constexpr, BC: tl.constexpr):
    """The program's share, its channels, True for those below C, and their channel group (UNIFORM: one for all)."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    first = tl.program_id(0) % blocks * BC
    c = first + tl.arange(0, BC)
    group = 0
    for i in tl.static_range(len(ENDS) - 1):
        if UNIFORM:
            group += (first >= ENDS[i]).to(tl.int32)
        else:
            group += (c >= ENDS[i]).to(tl.int32)
    return tl.program_id(0) // blocks, c, c < C, group


@triton.jit
def _selected(selection, b, group, G: tl.constexpr, UNIFORM: tl.constexpr):
    """True for each channel whose group instance b uses, and True where it uses any of them."""
    used = tl.load(selection + b * G + group) != 0
    if UNIFORM:
        return used, used
    else:
        return used, tl.max(used.to(tl.int32), 0) != 0


@triton.jit
def _place(tile, b, pixels, r, c, C: tl.constexpr, BR: tl.constexpr):
    """The offsets of a tile's elements [BR, BC], of instance b, and the number of pixels from its first one on."""
    first = (tile - b * tl.cdiv(pixels, BR)) * BR
    return (b.to(tl.int64) * pixels + first) * C + r[:, None] * C + c[None, :], pixels - first


@triton.jit
def _join(count, mean, squares, other_count, other_mean, other_squares):
    """The moments of two sets of values together."""
    total = tl.maximum(count + other_count, 1.0)
    share = other_count / total
    apart = other_mean - mean
    return count + other_count, mean + apart * share, squares + other_squares + apart * apart * (count * share)


@triton.jit(**_OF_THE_BATCH)
def statistics_kernel(
    x,  # [B, pixels, C]
    selection,  # uint8 [B, G]
    partial,  # float32 [shares, 3, C] count, mean, squares
    B, pixels, shares,
    C: tl.constexpr, ENDS: tl.constexpr, UNIFORM: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    share, c, c_ok, group = _block(C, ENDS, UNIFORM, BC)
    r = tl.arange(0, BR)
    count = tl.zeros((BC,), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    for tile in range(share, B * tl.cdiv(pixels, BR), shares):
        b = tile // tl.cdiv(pixels, BR)
        used, some = _selected(selection, b, group, len(ENDS), UNIFORM)
        if some:
            place, rows = _place(tile, b, pixels, r, c, C, BR)
            mine = c_ok & used
            ok = (r < rows)[:, None] & mine[None, :]
            # [BR, BC]
            value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
            here = tl.where(mine, tl.minimum(rows, BR).to(tl.float32), 0.0)
            tile_mean = tl.sum(value, 0) / tl.maximum(here, 1.0)
            apart = tl.where(ok, value - tile_mean[None, :], 0.0)
            count, mean, squares = _join(count, mean, squares, here, tile_mean, tl.sum(apart * apart, 0))
    at = partial + share * (3 * C) + c
    tl.store(at, count, mask=c_ok)
    tl.store(at + C, mean, mask=c_ok)
    tl.store(at + 2 * C, squares, mask=c_ok)


@triton.jit(do_not_specialize=["shares"])
def fold_kernel(
    partial,  # float32 [shares, 3, C] count, mean, squares
    statistics,  # float32 [3, C] mean, variance, count
    shares,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c_ok = c < C
    count = tl.zeros((BC,), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    for first in range(0, shares, BR):
        r = first + tl.arange(0, BR)
        ok = (r < shares)[:, None] & c_ok[None, :]
        at = partial + r[:, None] * (3 * C) + c[None, :]
        # [BR, BC]
        n = tl.load(at, mask=ok, other=0.0)
        m = tl.load(at + C, mask=ok, other=0.0)
        s = tl.load(at + 2 * C, mask=ok, other=0.0)
        here = tl.sum(n, 0)
        centre = tl.sum(n * m, 0) / tl.maximum(here, 1.0)
        apart = m - centre[None, :]
        count, mean, squares = _join(count, mean, squares, here, centre, tl.sum(s + n * apart * apart, 0))
    tl.store(statistics + c, mean, mask=c_ok)
    tl.store(statistics + C + c, squares / tl.maximum(count, 1.0), mask=c_ok)
    tl.store(statistics + 2 * C + c, count, mask=c_ok)


@triton.jit
def _affine(
    statistics, weight, bias, c, c_ok, C: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr
):
    """mean, 1 / sqrt(variance + EPS), and the scale and shift of the affine map of each channel."""
    mean = tl.load(statistics + c, mask=c_ok, other=0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(statistics + C + c, mask=c_ok, other=1.0) + EPS))
    scale = inverse
    shift = tl.zeros_like(mean)
    if WEIGHT:
        scale *= tl.load(weight + c, mask=c_ok, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)
    return mean, inverse, scale, shift


@triton.jit(**_OF_THE_BATCH)
def apply_kernel(
    x, y,  # [B, pixels, C]
    selection, statistics, weight, bias,
    B, pixels, shares,
    C: tl.constexpr, ENDS: tl.constexpr, UNIFORM: tl.constexpr,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    share, c, c_ok, group = _block(C, ENDS, UNIFORM, BC)
    mean, _, scale, shift = _affine(statistics, weight, bias, c, c_ok, C, EPS, WEIGHT, BIAS)
    r = tl.arange(0, BR)
    for tile in range(share, B * tl.cdiv(pixels, BR), shares):
        b = tile // tl.cdiv(pixels, BR)
        used, some = _selected(selection, b, group, len(ENDS), UNIFORM)
        place, rows = _place(tile, b, pixels, r, c, C, BR)
        there = (r < rows)[:, None] & c_ok[None, :]
        value = tl.zeros((BR, BC), tl.float32)
        if some:
            ok = there & (c_ok & used)[None, :]
            value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
            value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            value = tl.where(ok, value, 0.0)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=there)


@triton.jit
def _incoming(dy, x, place, ok, mean, scale, shift, RELU: tl.constexpr):
    """The gradient that reaches the affine map, 0 where not ok, and x - mean. [BR, BC]"""
    apart = tl.load(x + place, mask=ok, other=0.0).to(tl.float32) - mean[None, :]
    g = tl.load(dy + place, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(apart * scale[None, :] + shift[None, :] <= 0.0, 0.0, g)
    return g, apart


@triton.jit(**_OF_THE_BATCH)
def reduce_kernel(
    dy, x,  # [B, pixels, C]
    selection, statistics, weight, bias,
    partial,  # float32 [shares, 2, C] sum of g, sum of g * xhat
    B, pixels, shares,
    C: tl.constexpr, ENDS: tl.constexpr, UNIFORM: tl.constexpr,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    share, c, c_ok, group = _block(C, ENDS, UNIFORM, BC)
    mean, inverse, scale, shift = _affine(statistics, weight, bias, c, c_ok, C, EPS, WEIGHT, BIAS)
    r = tl.arange(0, BR)
    sum_g = tl.zeros((BR, BC), tl.float32)
    sum_gx = tl.zeros((BR, BC), tl.float32)
    for tile in range(share, B * tl.cdiv(pixels, BR), shares):
        b = tile // tl.cdiv(pixels, BR)
        used, some = _selected(selection, b, group, len(ENDS), UNIFORM)
        if some:
            place, rows = _place(tile, b, pixels, r, c, C, BR)
            ok = (r < rows)[:, None] & (c_ok & used)[None, :]
            g, apart = _incoming(dy, x, place, ok, mean, scale, shift, RELU)
            sum_g += g
            sum_gx += g * apart
    at = partial + share * (2 * C) + c
    tl.store(at, tl.sum(sum_g, 0), mask=c_ok)
    tl.store(at + C, tl.sum(sum_gx, 0) * inverse, mask=c_ok)


@triton.jit(**_OF_THE_BATCH)
def gradient_kernel(
    dy, x, dx,  # [B, pixels, C]
    selection, statistics, weight, bias,
    sums,  # float32 [2, C] of `reduce_kernel`
    B, pixels, shares,
    C: tl.constexpr, ENDS: tl.constexpr, UNIFORM: tl.constexpr,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    THROUGH: tl.constexpr,  # the statistics are those of x: the gradient goes through them
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    share, c, c_ok, group = _block(C, ENDS, UNIFORM, BC)
    mean, inverse, scale, shift = _affine(statistics, weight, bias, c, c_ok, C, EPS, WEIGHT, BIAS)
    if THROUGH:
        part = scale / tl.maximum(tl.load(statistics + 2 * C + c, mask=c_ok, other=1.0), 1.0)
        dmean = part * tl.load(sums + c, mask=c_ok, other=0.0)
        dvar = part * inverse * tl.load(sums + C + c, mask=c_ok, other=0.0)
    r = tl.arange(0, BR)
    for tile in range(share, B * tl.cdiv(pixels, BR), shares):
        b = tile // tl.cdiv(pixels, BR)
        used, some = _selected(selection, b, group, len(ENDS), UNIFORM)
        place, rows = _place(tile, b, pixels, r, c, C, BR)
        there = (r < rows)[:, None] & c_ok[None, :]
        value = tl.zeros((BR, BC), tl.float32)
        if some:
            ok = there & (c_ok & used)[None, :]
            g, apart = _incoming(dy, x, place, ok, mean, scale, shift, RELU)
            value = g * scale[None, :]
            if THROUGH:
                value = value - dmean[None, :] - apart * dvar[None, :]
            value = tl.where(ok, value, 0.0)
        tl.store(dx + place, value.to(dx.dtype.element_ty), mask=there)


@triton.jit(**_OF_THE_BATCH)
def activate_kernel(
    x, y,  # [B, pixels, C]
    selection,  # int32 [B]: levels
    scale, shift,  # float32 [C]
    B, pixels, shares,
    C: tl.constexpr, ENDS: tl.constexpr, UNIFORM: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    share, c, c_ok, group = _block(C, ENDS, UNIFORM, BC)
    factor = tl.load(scale + c, mask=c_ok, other=0.0)[None, :]
    offset = tl.load(shift + c, mask=c_ok, other=0.0)[None, :]
    r = tl.arange(0, BR)
    for tile in range(share, B * tl.cdiv(pixels, BR), shares):
        b = tile // tl.cdiv(pixels, BR)
        _, some = _selected(selection, b, group, 1, UNIFORM)
        if some:
            place, rows = _place(tile, b, pixels, r, c, C, BR)
            ok = (r < rows)[:, None] & c_ok[None, :]
            value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32) * factor + offset
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(y + place, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def pool_kernel(
    x,  # [B, pixels, C]
    y,  # [B, C]
    scale, shift,  # float32 [C]
    pixels,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program has BC channels of one instance."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    c_ok = c < C
    factor = tl.load(scale + c, mask=c_ok, other=0.0)[None, :]
    offset = tl.load(shift + c, mask=c_ok, other=0.0)[None, :]
    r = tl.arange(0, BR)
    sums = tl.zeros((BR, BC), tl.float32)
    for first in range(0, pixels, BR):
        ok = (first + r < pixels)[:, None] & c_ok[None, :]
        value = tl.load(x + (b * pixels + first) * C + r[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        value = tl.maximum(value * factor + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
        sums += tl.where(ok, value, 0.0)
    tl.store(y + b * C + c, (tl.sum(sums, 0) / pixels).to(y.dtype.element_ty), mask=c_ok)
