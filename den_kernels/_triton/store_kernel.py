"""The last step of the convolution kernels: the sums of a tile, on their way to memory."""

import triton
import triton.language as tl


@triton.jit
def _pooled(
    shortcut, instance, i, j, live, n, H, W, map_b, map_h, map_w, C: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The mean of POOL x POOL pixels of shortcut, fewer at the lower and right border; 0 in channels from C on."""
    mean = tl.load(
        shortcut + (instance.to(tl.int64) * map_b + i * POOL * map_h + j * POOL * map_w)[:, None] + n[None, :],
        mask=live[:, None] & (n < C)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    for t in tl.static_range(1, POOL * POOL):
        h = i * POOL + t // POOL
        w = j * POOL + t % POOL
        ok = (live & (h < H) & (w < W))[:, None] & (n < C)[None, :]
        at = instance.to(tl.int64) * map_b + h * map_h + w * map_w
        mean += tl.load(shortcut + at[:, None] + n[None, :], mask=ok, other=0.0).to(tl.float32)
    if POOL > 1:
        count = tl.minimum(H - i * POOL, POOL) * tl.minimum(W - j * POOL, POOL)
        mean /= tl.maximum(count, 1).to(tl.float32)[:, None]
    return mean


@triton.jit
def store(
    acc, out, bias, scale_out, following, scale_next, shift_next, levels_next,
    shortcut, MAP_H, MAP_W, map_b, map_h, map_w, i, j, gate, gate_b,
    at, instance, live, idle, n, n_ok,
    BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, NEXT: tl.constexpr,
    POOL: tl.constexpr, MAP_C: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """out = relu(out + acc * scale_out + bias), of which every part may be left out.

    GATE: out = out + gate[instance] * relu(acc * scale_out + bias).
    POOL: the mean of POOL x POOL pixels of shortcut stands in for what out holds.
    NEXT: also writes following = relu(out * scale_next + shift_next), for instances above level 0 in levels_next. A
    tile is `idle` if it is computed for these alone: its instances are at level 0, and keep out as it is if that holds
    the shortcut already.
    """
    if SCALE:
        acc *= tl.load(scale_out + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    place = at[:, None] + n[None, :]
    ok = live[:, None] & n_ok[None, :]
    if GATE:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc *= tl.load(gate + instance * gate_b, mask=live, other=0.0).to(tl.float32)[:, None]
    if NEXT or POOL > 0:
        acc = tl.where(idle != 0, 0.0, acc)
    if POOL > 0:
        acc += _pooled(shortcut, instance, i, j, live, n, MAP_H, MAP_W, map_b, map_h, map_w, MAP_C, POOL)
    elif ADD:
        acc += tl.load(out + place, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    value = acc.to(out.dtype.element_ty)
    if NEXT:
        tl.store(out + place, value, mask=ok if POOL > 0 else ok & (idle == 0))
        factor = tl.load(scale_next + n, mask=n_ok, other=0.0)[None, :]
        offset = tl.load(shift_next + n, mask=n_ok, other=0.0)[None, :]
        acc = tl.maximum(value.to(tl.float32) * factor + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
        used = (tl.load(levels_next + instance, mask=live, other=0) > 0)[:, None] & n_ok[None, :]
        tl.store(following + place, acc.to(out.dtype.element_ty), mask=used)
    else:
        tl.store(out + place, value, mask=ok)
