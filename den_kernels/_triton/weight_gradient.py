"""The weight gradient kernel on tensors."""

from typing import Any

import torch
from torch import Tensor

from .._geometry import Geometry
from ..plan import Route, channels_of
from . import choice
from .choice import Side
from .convolve import channels_last, check_pixels, instance_stride, precision
from .launch import Launch, architecture
from .rules import Tile
from .weight_gradient_kernel import weight_gradient_kernel


def _lists(mask: Tensor, side: Side, unit: int) -> tuple[Tensor, Tensor]:
    """Per unit of channels, the instances that selected it: int32 [units, B], those first; int32 [units] how many."""
    chosen = channels_of(mask, side.sizes, side.channels)[:, ::unit].t()
    order = chosen.logical_not().to(torch.int8).argsort(dim=1, stable=True).int()
    return order.contiguous(), chosen.sum(1, dtype=torch.int32)


def _of_levels(route: Route, n: Side, k: Side, cardinality: int, tile: Tile, nothing: Tensor) -> dict[str, Any]:
    """The instances that use a tile: the first ones in the order of the route. `nothing` is not read."""
    wide = choice.wide_sides(n, k, cardinality, tile)
    return dict(
        order=route.order, offsets=route.offsets, counts=route.order, bits_n=nothing, bits_k=nothing,
        N_WIDTHS=n.widths(route.groups), K_WIDTHS=k.widths(route.groups), LISTS="",
        N_WIDE=wide[0], K_WIDE=wide[1], N_BITS=False, K_BITS=False,
    )  # fmt: skip


def _of_mask(
    mask: Tensor, order: Tensor, n: Side, k: Side, cardinality: int, tile: Tile, nothing: Tensor
) -> dict[str, Any]:
    """Those on the list of the tile's unit; without lists, all of them. `nothing` is not read."""
    lists = choice.listed_side(n, k, cardinality, tile)
    offsets = counts = torch.full((2,), mask.shape[0], dtype=torch.int32, device=mask.device)
    if lists:
        order, counts = _lists(mask, *((n, tile.columns) if lists == "n" else (k, tile.depth)))
    bits: dict[str, Any] = {}
    for name, side in (("n", n), ("k", k)):
        wanted = bool(side.sizes) and lists != name
        chosen = channels_of(mask, side.sizes, side.channels).to(torch.uint8).contiguous() if wanted else nothing
        bits |= {f"bits_{name}": chosen, f"{name.upper()}_BITS": wanted}
    return dict(
        order=order, offsets=offsets, counts=counts, N_WIDTHS=(n.channels,), K_WIDTHS=(k.channels,), LISTS=lists,
        N_WIDE=False, K_WIDE=False, **bits,
    )  # fmt: skip


def weight_gradient_launch(
    grad: Tensor,
    source: Tensor,
    kernel: tuple[int, int],
    route: Route,
    geometry: Geometry,
    arch: int,
    multiprocessors: int,
) -> Launch:
    """What `weight_gradient` launches on a device of this architecture; `partial` is among the arguments."""
    (B, NC, OH, OW), (_, KC, H, W) = grad.shape, source.shape
    n, k = Side(NC, tuple(geometry.out_sizes)), Side(KC, tuple(geometry.in_sizes))
    product = precision(grad.dtype)
    tile = choice.choose_weight_tile(n, k, grad.dtype, arch, route.mask is not None, product == "ieee")
    k_tiles = choice.k_tiles(NC, KC, geometry.groups, tile)
    if route.mask is None:
        users = _of_levels(route, n, k, geometry.groups, tile, grad)
    else:
        users = _of_mask(route.mask, route.order, n, k, geometry.groups, tile, grad)
    R, S = kernel
    tiles = -(-NC // tile.columns) * k_tiles * R * S
    splits = choice.choose_splits(tiles, B * OH * OW, tile, multiprocessors)
    partial = torch.empty(splits, NC, R, S, KC // geometry.groups, dtype=torch.float32, device=grad.device)
    arguments: dict[str, Any] = dict(
        grad=grad, source=source, partial=partial, B=B, H=H, W=W, OH=OH, OW=OW,
        grad_b=instance_stride(grad), grad_h=grad.stride(2), grad_w=grad.stride(3),
        source_b=instance_stride(source), source_h=source.stride(2), source_w=source.stride(3),
        NC=NC, KC=KC, CARDINALITY=geometry.groups, R=R, S=S, STRIDE_H=geometry.stride[0], STRIDE_W=geometry.stride[1],
        PAD_H=geometry.padding[0], PAD_W=geometry.padding[1], DIL_H=geometry.dilation[0], DIL_W=geometry.dilation[1],
        K_TILES=k_tiles, WHOLE=OH * OW % tile.rows == 0, PRECISION=product, splits=splits,
        BN=tile.columns, BK=tile.depth, BP=tile.rows, num_warps=tile.warps, num_stages=tile.stages, **users,
    )  # fmt: skip
    return Launch(weight_gradient_kernel, min(tiles * splits, tile.programs * multiprocessors), arguments)


def weight_gradient(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    source: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]: its shape and dtype count
    route: Route,
    geometry: Geometry,
) -> Tensor:  # as weight, channels-last in memory
    """The gradient of the weight, each element over the instances that used it; deterministic, without waiting."""
    if grad.numel() == 0 or source.numel() == 0:
        return torch.zeros_like(weight, memory_format=torch.channels_last)
    check_pixels(grad, source)
    R, S = weight.shape[2:]
    launch = weight_gradient_launch(
        channels_last(grad), channels_last(source), (R, S), route, geometry, *architecture(grad.device)
    )
    return launch.run(grad)["partial"].sum(0).to(weight.dtype).permute(0, 3, 1, 2)
