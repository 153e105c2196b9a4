"""The passes of `dynamic_batch_norm` on tensors: statistics and apply forward, reduce and gradient backward; and
`activate`, the folded norm and ReLU in front of a residual block at inference, and `pool`, those behind the last one.

All maps are channels-last in memory. A pass reads what the instances use of its maps once; `apply` and `gradient` write
the whole of theirs. Nothing waits for the device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .choice import ceil_power, unit_of
from .launch import Launch, architecture
from .norm_kernel import (
    activate_kernel,
    apply_kernel,
    fold_kernel,
    gradient_kernel,
    pool_kernel,
    reduce_kernel,
    statistics_kernel,
)


class Affine(NamedTuple):
    """`relu((x - mean) / sqrt(variance + eps) * weight + bias)`, each part where there is one."""

    statistics: Tensor  # float32 [3, C] mean, variance, count
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float
    relu: bool


class Tile(NamedTuple):
    """The part of the map that a program reads at a time, and the warps that run it."""

    rows: int  # pixels of one instance
    columns: int  # channels
    warps: int
    uniform: bool  # all channels of a tile lie in one group


def choose_tile(groups: Sequence[int], pixels: int, element_bytes: int, tile_bytes: int) -> Tile:
    """The tile of a pass, of `tile_bytes` where an instance has that many.

    Its channels are those that an instance selects together, within 64 bytes (under which memory is read in vain) and
    128 (above which nothing is gained).

    >>> choose_tile((64, 64, 128), 64, 2, 16384)
    Tile(rows=64, columns=64, warps=4, uniform=True)
    >>> choose_tile((16, 16, 32), 1024, 2, 4096)
    Tile(rows=64, columns=32, warps=4, uniform=False)
    """
    inner = tuple(accumulate(groups))[:-1]
    widest = ceil_power(sum(groups), 1, 128 // element_bytes)
    columns = max(unit_of(inner, widest), min(widest, 64 // element_bytes))
    rows = ceil_power(pixels, 4, tile_bytes // (columns * element_bytes))
    warps = ceil_power(rows * columns * element_bytes // 1024, 1, 4)
    return Tile(rows, columns, warps, all(end % columns == 0 for end in inner))


def choose_shares(channels: int, tiles: int, tile: Tile, multiprocessors: int) -> int:
    """Programs for each block of channels: half of the warps that the device holds, no more than there are tiles.

    >>> choose_shares(256, 256, Tile(64, 64, 2, True), 132)
    256
    >>> choose_shares(64, 2048, Tile(128, 64, 4, True), 132)
    1056
    """
    blocks = -(-channels // tile.columns)
    return max(1, min(tiles, 32 * multiprocessors // (tile.warps * blocks)))


def _walk(
    kernel: Any,
    x: Tensor,  # [B, C, H, W] channels-last
    selection: Tensor,  # bool [B, G], or levels int32 [B] of one group
    groups: Sequence[int],
    tile_bytes: int,
    multiprocessors: int,
) -> Launch:
    """The launch of a pass over x, with the arguments that all passes share."""
    B, C, H, W = x.shape
    tile = choose_tile(groups, H * W, x.element_size(), tile_bytes)
    selection = selection.view(torch.uint8) if selection.dtype == torch.bool else selection
    shares = choose_shares(C, B * -(-H * W // tile.rows), tile, multiprocessors)
    arguments = dict(
        x=x, selection=selection, B=B, pixels=H * W, shares=shares,
        C=C, ENDS=tuple(accumulate(groups)), UNIFORM=tile.uniform,
        BR=tile.rows, BC=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return Launch(kernel, shares * -(-C // tile.columns), arguments)


def _affine(x: Tensor, affine: Affine) -> dict[str, Any]:
    """Arguments of a kernel for an affine map; x [B, C, H, W] stands for a weight or bias that is None."""
    weight, bias = affine.weight, affine.bias
    return dict(
        statistics=affine.statistics, weight=x if weight is None else weight.contiguous(),
        bias=x if bias is None else bias.contiguous(),
        EPS=affine.eps, WEIGHT=weight is not None, BIAS=bias is not None, RELU=affine.relu,
    )  # fmt: skip


def statistics_launch(
    x: Tensor,  # [B, C, H, W] channels-last
    selection: Tensor,  # bool [B, G]
    groups: Sequence[int],
    multiprocessors: int,
) -> Launch:
    """The launch of `statistics_kernel`; `partial` is among its arguments."""
    launch = _walk(statistics_kernel, x, selection, groups, 16384, multiprocessors)
    partial = torch.empty(launch.arguments["shares"], 3, x.shape[1], dtype=torch.float32, device=x.device)
    return launch.extended({"partial": partial})


def fold_launch(
    partial: Tensor,  # float32 [shares, 3, C]
    statistics: Tensor,  # float32 [3, C], written
) -> Launch:
    """The launch of `fold_kernel`: many programs of few channels, because it has little to read."""
    shares, _, C = partial.shape
    columns = ceil_power(C, 1, 8)
    arguments = dict(partial=partial, statistics=statistics, shares=shares, C=C, BR=256, BC=columns, num_warps=4)
    return Launch(fold_kernel, -(-C // columns), arguments)


def apply_launch(
    x: Tensor,  # [B, C, H, W] channels-last
    y: Tensor,  # [B, C, H, W] channels-last, written
    selection: Tensor,  # bool [B, G]
    affine: Affine,
    groups: Sequence[int],
    multiprocessors: int,
) -> Launch:
    """The launch of `apply_kernel`."""
    launch = _walk(apply_kernel, x, selection, groups, 4096, multiprocessors)
    return launch.extended(_affine(x, affine) | {"y": y})


def reduce_launch(
    dy: Tensor,  # [B, C, H, W] channels-last
    x: Tensor,  # [B, C, H, W] channels-last
    selection: Tensor,  # bool [B, G]
    affine: Affine,
    groups: Sequence[int],
    multiprocessors: int,
) -> Launch:
    """The launch of `reduce_kernel`; `partial` is among its arguments."""
    launch = _walk(reduce_kernel, x, selection, groups, 4096, multiprocessors)
    partial = torch.empty(launch.arguments["shares"], 2, x.shape[1], dtype=torch.float32, device=x.device)
    return launch.extended(_affine(x, affine) | {"dy": dy, "partial": partial})


def gradient_launch(
    dy: Tensor,  # [B, C, H, W] channels-last
    x: Tensor,  # [B, C, H, W] channels-last
    dx: Tensor,  # [B, C, H, W] channels-last, written
    selection: Tensor,  # bool [B, G]
    affine: Affine,
    sums: Tensor | None,  # float32 [2, C] of `_reduce`; None: the statistics are constants
    groups: Sequence[int],
    multiprocessors: int,
) -> Launch:
    """The launch of `gradient_kernel`."""
    launch = _walk(gradient_kernel, x, selection, groups, 4096, multiprocessors)
    through = {"sums": x if sums is None else sums, "THROUGH": sums is not None}
    return launch.extended(_affine(x, affine) | through | {"dy": dy, "dx": dx})


def activate_launch(
    x: Tensor,  # [B, C, H, W] channels-last
    y: Tensor,  # [B, C, H, W] channels-last, written above level 0
    levels: Tensor,  # int32 [B]
    scale: Tensor,  # float32 [C]
    shift: Tensor,  # float32 [C]
    multiprocessors: int,
) -> Launch:
    """The launch of `activate_kernel`."""
    launch = _walk(activate_kernel, x, levels, (x.shape[1],), 8192, multiprocessors)
    return launch.extended({"y": y, "scale": scale, "shift": shift})


def activate(
    x: Tensor,  # [B, C, H, W] channels-last
    levels: Tensor,  # int32 [B]
    scale: Tensor,  # float32 [C]
    shift: Tensor,  # float32 [C]
) -> Tensor:  # as x
    """relu(x * scale + shift) of the instances above level 0. Of the others nothing is read or written."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel():
        activate_launch(x, y, levels, scale.contiguous(), shift.contiguous(), architecture(x.device)[1]).run(x)
    return y


def pool_launch(
    x: Tensor,  # [B, C, H, W] channels-last
    y: Tensor,  # [B, C], written
    scale: Tensor,  # float32 [C]
    shift: Tensor,  # float32 [C]
) -> Launch:
    """The launch of `pool_kernel`."""
    B, C, H, W = x.shape
    tile = choose_tile((C,), H * W, x.element_size(), 4096)
    arguments = dict(
        x=x, y=y, scale=scale, shift=shift, pixels=H * W, C=C, BR=tile.rows, BC=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return Launch(pool_kernel, B * -(-C // tile.columns), arguments)


def pool(
    x: Tensor,  # [B, C, H, W] channels-last
    scale: Tensor,  # float32 [C]
    shift: Tensor,  # float32 [C]
) -> Tensor:  # [B, C] of x's dtype
    """The means of relu(x * scale + shift) over the pixels of each instance, in one launch."""
    y = x.new_empty(x.shape[:2])
    if x.numel():
        pool_launch(x, y, scale.contiguous(), shift.contiguous()).run(x)
    return y


def _statistics(x: Tensor, selection: Tensor, groups: Sequence[int]) -> Tensor:
    """float32 [3, C]: mean, biased variance and count over the instances that use a channel; zeros where none does."""
    made = torch.zeros(3, x.shape[1], dtype=torch.float32, device=x.device)
    if x.numel():
        launch = statistics_launch(x, selection, groups, architecture(x.device)[1])
        fold_launch(launch.run(x)["partial"], made).run(x)
    return made


def _reduce(dy: Tensor, x: Tensor, selection: Tensor, affine: Affine, groups: Sequence[int]) -> Tensor:
    """float32 [2, C]: the gradients of bias and weight."""
    if x.numel() == 0:
        return torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    launch = reduce_launch(dy, x, selection, affine, groups, architecture(x.device)[1])
    return launch.run(x)["partial"].sum(0)


def forward(
    x: Tensor,  # [B, C, H, W]
    selection: Tensor,  # bool [B, G]
    statistics: Tensor | None,  # float32 [3, C] mean, biased variance, count; None: those of the batch
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    groups: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:  # channels-last, float32 [3, C]
    """The output, 0 in channels that are not used, and the statistics."""
    x, selection = x.contiguous(memory_format=torch.channels_last), selection.contiguous()
    if statistics is None:
        statistics = _statistics(x, selection, groups)
    else:
        statistics = statistics.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(x)
    if x.numel():
        affine = Affine(statistics, weight, bias, eps, relu)
        apply_launch(x, y, selection, affine, groups, architecture(x.device)[1]).run(x)
    return y, statistics


def backward(
    dy: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    selection: Tensor,  # bool [B, G]
    statistics: Tensor,  # float32 [3, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    groups: Sequence[int],
    eps: float,
    relu: bool,
    training: bool,  # the statistics are those of x, so that the gradient goes through them
    need_dx: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:  # dx channels-last, float32 [2, C] dbias and dweight; empty where not needed
    """The gradients, deterministic; dx is 0 in channels that are not used."""
    dy, x = (map.contiguous(memory_format=torch.channels_last) for map in (dy, x))
    selection, affine = selection.contiguous(), Affine(statistics, weight, bias, eps, relu)
    dx, sums = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    through = _reduce(dy, x, selection, affine, groups) if need_sums or training else sums
    if need_dx:
        dx = torch.empty_like(x)
    if dx.numel():
        launch = gradient_launch(
            dy, x, dx, selection, affine, through if training else None, groups, architecture(x.device)[1]
        )
        launch.run(x)
    return dx, through if need_sums else sums
