"""Segments of a route, and rows of instances: gathered into the packed batch of one segment, and scattered back.

A row is one instance's map, channels-last in memory, so a segment of a route is a handful of contiguous runs. The C++
pass applies an affine map and ReLU on the way and converts float16 to float32 and back (a float16 convolution on a CPU
is ten times slower than a float32 one). Without the extension the same is done with `index_select` and `index_copy_`
on a flat view: on a channels-last tensor those two run at memory speed only through that view.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._extension import extension
from .eager import is_ordinary
from .plan import Route

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Segment(NamedTuple):
    """Instances order[start:end] of a route, which run together, and the groups that they selected."""

    start: int
    end: int
    groups: tuple[bool, ...]


def read_route(route: Route) -> tuple[list[int], list[int]]:
    """offsets [S + 1] and order [B] of a route on a CPU; ValueError where they are not those of a plan."""
    offsets, order = route.offsets.tolist(), route.order.tolist()
    batch = len(order)
    if offsets[0] != 0 or offsets[-1] != batch or sorted(offsets) != offsets:
        raise ValueError(f"route: offsets must rise from 0 to {batch} instances, got {offsets}")
    if batch and not 0 <= min(order) <= max(order) < batch:
        raise ValueError(f"route: order must hold instances 0..{batch - 1}, got {min(order)}..{max(order)}")
    return offsets, order


def segments(route: Route) -> list[Segment]:
    """The segments of a route that hold instances, read on the host (CPU routes only)."""
    (offsets, order), G = read_route(route), route.groups
    found = []
    for s, (start, end) in enumerate(pairwise(offsets)):
        if start < end:
            mask = route.mask
            groups = (True,) * (G - s) + (False,) * s if mask is None else tuple(mask[order[start]].tolist())
            found.append(Segment(start, end, groups))
    return found


def _in_cpp(*dtypes: torch.dtype) -> bool:
    if extension is None or any(dtype not in _DTYPES for dtype in dtypes):
        return False
    return dtypes[0] == dtypes[1] or torch.bfloat16 not in dtypes


def gather_rows(
    x: Tensor,  # [B, C, H, W] channels-last
    order: Tensor,  # int32 [n] instance indices
    width: int,
    scale: Tensor | None = None,  # float32 [width]
    shift: Tensor | None = None,  # float32 [width]
    relu: bool = False,
    dtype: torch.dtype | None = None,
    start: int = 0,
) -> Tensor:  # [n, width, H, W] channels-last
    """Gather `width` channels from `start` of the instances in `order`.

    Equivalent to `relu(x[order, start:start + width] * scale + shift).to(dtype)`.
    """
    H, W = x.shape[2:]
    n, dtype = order.numel(), dtype or x.dtype
    if not _in_cpp(x.dtype, dtype):
        rows = x.permute(0, 2, 3, 1)[order.long(), :, :, start : start + width]
        if scale is not None and shift is not None:
            rows = rows.to(torch.promote_types(x.dtype, torch.float32)) * scale + shift
        return (rows.relu() if relu else rows).to(dtype).permute(0, 3, 1, 2)
    out = torch.empty(n, H, W, width, dtype=dtype).permute(0, 3, 1, 2)
    extension.gather_rows(x, out, order, start, scale, shift, relu)
    return out


def scatter_rows_(
    dst: Tensor,  # [B, C, H, W] channels-last, written in place
    src: Tensor,  # [n, width, H, W] channels-last
    order: Tensor,  # int32 [n] instance indices, all different
    start: int = 0,
    accumulate: bool = False,
) -> None:
    """Write (or add) `src` into channels `start:start + width` of the instances in `order`.

    Equivalent to `dst[order, start:start + width] = src` (or `+=`).
    """
    if not _in_cpp(src.dtype, dst.dtype):
        width = src.shape[1]
        rows = dst.permute(0, 2, 3, 1)[:, :, :, start : start + width]
        values = src.permute(0, 2, 3, 1).to(dst.dtype)
        rows.index_put_((order.long(),), values, accumulate=accumulate)
        return
    extension.scatter_rows(src, dst, order, start, accumulate)


def pool_rows(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """The parameter-free shortcut: average pooling over stride x stride windows, then channels of zeros.

    Equivalent to `F.pad(F.avg_pool2d(x, stride, ceil_mode=True), (0, 0, 0, 0, 0, out_channels - C))`.
    x: [B, C, H, W] channels-last; the result is [B, out_channels, ceil(H / stride), ceil(W / stride)] channels-last.
    """
    B, C, H, W = x.shape
    if stride == 1 and out_channels == C:
        return x.clone(memory_format=torch.channels_last)
    if not x.is_cpu or not _in_cpp(x.dtype, x.dtype) or not is_ordinary(x):
        pooled = x if stride == 1 else torch.nn.functional.avg_pool2d(x, stride, ceil_mode=True)
        padded = torch.nn.functional.pad(pooled, (0, 0, 0, 0, 0, out_channels - C))
        return padded.clone(memory_format=torch.channels_last)
    out = torch.empty(B, -(-H // stride), -(-W // stride), out_channels, dtype=x.dtype).permute(0, 3, 1, 2)
    extension.pool_rows(x, out, stride)
    return out
