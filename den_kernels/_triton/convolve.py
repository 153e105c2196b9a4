"""The convolution kernel on tensors: forward and data gradient."""

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._geometry import Geometry, dense
from ..float32 import allows_tf32
from ..plan import Route, channels_of
from . import boxes, choice, strips
from .box_kernel import box_kernel
from .choice import Shape, Side
from .conv_kernel import convolve_kernel
from .launch import Launch, architecture
from .rules import Tile


class Following(NamedTuple):
    """A second output: `relu(out * scale + shift)` of the instances that the next block uses, which it reads."""

    map: Tensor  # as out, with its strides
    scale: Tensor  # float32 [channels written]
    shift: Tensor  # float32 [channels written]
    levels: Tensor  # int32 [B] of the next block


class Pooled(NamedTuple):
    """A block's own shortcut: a map of which means over `size` x `size` pixels are added, in its channels."""

    map: Tensor  # [B, C, H, W] channels-last
    size: int


class Epilogue(NamedTuple):
    """The last step before the sums are written: `relu(out + sum * scale + bias)`, any part of which may be absent."""

    bias: Tensor | None = None  # [channels written]
    scale: Tensor | None = None  # float32 [channels written]
    add: bool = False  # to what out holds
    shortcut: Pooled | None = None  # in place of what out holds; instances at level 0 get it too
    relu: bool = False
    following: Following | None = None  # of the sum, for instances at level 0 too
    gate: Tensor | None = None  # [B]: `out + gate * relu(sum * scale + bias)` instead, with `add`


PLAIN = Epilogue()


class Selected(NamedTuple):
    """The channels that each instance selected on one side of the GEMM, for a mask."""

    units: Tensor  # int32 [B, channels / unit]: the selected ones first
    counts: Tensor  # int32 [B]
    bits: Tensor  # uint8 [B, channels]


def channels_last(x: Tensor) -> Tensor:
    """x [B, C, H, W] with neighbouring channels next to each other, from a 16-byte boundary on; a copy where not.

    Loads are 128 bits wide only there; with the copy the map is read once more, without it slowly for every tap.
    """
    fits = x.stride(1) == 1 and x.stride(3) >= x.shape[1] and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.channels_last)


def dense_vector(operand: Tensor, name: str) -> Tensor:
    """A vector [n] without gaps in memory; what has strides that the kernel knows, a map or the gate, as it is."""
    return operand.contiguous() if operand.ndim == 1 and name != "gate" else operand


def instance_stride(x: Tensor) -> int:
    """Elements from an instance of x [B, C, H, W] to the next; of one alone, whose stride is arbitrary, its size."""
    return x.stride(0) if x.shape[0] > 1 else x[0].numel()


def check_pixels(*maps: Tensor) -> None:
    """Raise ValueError for a map [B, C, H, W] of 2**31 pixels or more: the kernels count pixels in 32 bits."""
    for x in maps:
        if x.shape[0] * x.shape[2] * x.shape[3] >= 1 << 31:
            raise ValueError(f"dynamic_conv2d: a batch must have fewer than 2**31 pixels, got {list(x.shape)}")


def _select(mask: Tensor, side: Side, unit: int) -> Selected:
    """The selection of one side by mask, bool [B, G], in units of `unit` channels; does not wait for the device."""
    bits = channels_of(mask, side.sizes, side.channels)
    chosen = bits[:, ::unit]
    units = chosen.logical_not().to(torch.int8).argsort(dim=1, stable=True).int()
    return Selected(units.contiguous(), chosen.sum(1, dtype=torch.int32), bits.to(torch.uint8).contiguous())


def _gemm(
    route: Route, n: Side, k: Side, cardinality: int, skip_empty: bool, tile: Tile, nothing: Tensor
) -> tuple[dict, Shape]:
    """The arguments that describe the selection; `nothing` [...] stands for tensors that the kernel does not read."""
    if route.mask is None:
        shape = choice.shape_of_levels(n, k, route.groups, cardinality, skip_empty, tile)
        n_mask = k_mask = choice.ALL
        sides = {f"{name}_{s}": nothing for s in "nk" for name in ("units", "counts", "bits")}
    else:
        shape, n_mask, k_mask = choice.shape_of_masks(n, k, cardinality, tile)
        sides = {}
        for name, side, unit in (("n", n, shape.bns[0]), ("k", k, shape.bks[0])):
            chosen = _select(route.mask, side, unit) if side.sizes else Selected(nothing, nothing, nothing)
            sides |= {f"units_{name}": chosen.units, f"counts_{name}": chosen.counts, f"bits_{name}": chosen.bits}
    constants = {"MASKED": route.mask is not None, "N_MASK": n_mask, "K_MASK": k_mask}
    return sides | constants, shape


def _tiles_at_most(shape: Shape, instances: int, pixels: int, classes: int, rows: int, masked: bool) -> int:
    """An upper bound of the tiles of any route."""
    per_row = classes * max(shape.columns, default=0)
    if masked:
        return instances * -(-pixels // rows) * per_row
    return (-(-instances * pixels // rows) + len(shape.columns)) * per_row


def precision(dtype: torch.dtype) -> str:
    """Triton's name of the precision of products: TF32 where torch's settings for convolutions allow it."""
    return "tf32" if dtype != torch.float32 or allows_tf32() else "ieee"


def _shared_arguments(
    source: Tensor,  # [B, KC, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    out: Tensor,  # [B, NC, OH, OW] channels-last
    route: Route,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
) -> dict[str, Any]:
    """The arguments that every kernel of a convolution takes: those of the result, the window and the epilogue."""
    after, (_, NC, OH, OW) = epilogue.following, out.shape
    added, pool = epilogue.shortcut or Pooled(source, 0)
    pointers: dict[str, Any] = {
        "bias": epilogue.bias, "scale_out": epilogue.scale, "gate": epilogue.gate, "following": after and after.map,
        "scale_next": after and after.scale, "shift_next": after and after.shift, "levels_next": after and after.levels,
    }  # fmt: skip
    return dict(
        out=out, order=route.order, offsets=route.offsets, OH=OH, OW=OW, NC=NC, R=weight.shape[2], S=weight.shape[3],
        out_b=instance_stride(out), out_h=out.stride(2), out_w=out.stride(3), shortcut=added,
        MAP_H=added.shape[2], MAP_W=added.shape[3], MAP_C=added.shape[1] if pool else 0, POOL=pool,
        map_b=instance_stride(added), map_h=added.stride(2), map_w=added.stride(3),
        PAD_H=geometry.padding[0], PAD_W=geometry.padding[1], DIL_H=geometry.dilation[0], DIL_W=geometry.dilation[1],
        TRANSPOSED=transposed, BIAS=epilogue.bias is not None, SCALE=epilogue.scale is not None,
        RELU=epilogue.relu, ADD=epilogue.add, NEXT=after is not None, GATE=epilogue.gate is not None,
        gate_b=1 if epilogue.gate is None else epilogue.gate.stride(0),
        **{name: source if tensor is None else dense_vector(tensor, name) for name, tensor in pointers.items()},
    )  # fmt: skip


def convolution_launch(
    source: Tensor,  # [B, KC, H, W] channels-last
    weight: Tensor,  # [C_out, C_in / groups, R, S] channels-last
    out: Tensor,  # [B, NC, OH, OW] channels-last
    route: Route,
    geometry: Geometry,
    transposed: bool,
    skip_empty: bool,
    epilogue: Epilogue,
    arch: int,
    multiprocessors: int,
) -> Launch:
    """The launch that `convolve` makes on a device of this architecture."""
    (B, KC, H, W), (_, NC, OH, OW) = source.shape, out.shape
    sizes = (tuple(geometry.out_sizes), tuple(geometry.in_sizes))
    n, k = (Side(c, s) for c, s in zip((NC, KC), sizes[::-1] if transposed else sizes, strict=True))
    product = precision(source.dtype)
    tile = choice.choose_tile(NC, KC // geometry.groups, source.dtype, arch, product == "ieee")
    skip_empty = skip_empty and epilogue.following is None and epilogue.shortcut is None
    arguments = _shared_arguments(source, weight, out, route, geometry, transposed, epilogue)
    pool = arguments["POOL"]
    fitted = boxes.Arguments(
        n, k, route.groups, (OH, OW), (geometry.stride[0], geometry.stride[1]), geometry.groups, source.dtype,
        route.mask is not None, boxes.is_aligned(source, weight), epilogue.following is not None or pool > 0,
        weight.shape[2], geometry.dilation[0], pool > 1,
    )  # fmt: skip
    wide = strips.is_wide(NC, B * OH * OW, multiprocessors)
    if chosen := strips.choose_strips(fitted, skip_empty, arch, wide):
        from .strip_kernel import strip_kernel

        arguments |= strips.arguments_of(source, weight, chosen, OW, transposed)
        most = _tiles_at_most(chosen[1], B, OH * OW, 1, chosen[0].rows, False)
        return Launch(strip_kernel, min(most, chosen[0].programs * multiprocessors), arguments)
    if chosen := boxes.choose_boxes(fitted, skip_empty, arch):
        arguments |= boxes.arguments_of(source, weight, chosen, OW, transposed)
        most = _tiles_at_most(chosen[1], B, OH * OW, 1, chosen[0].rows, False)
        return Launch(box_kernel, min(most, chosen[0].programs * multiprocessors), arguments)
    selection, shape = _gemm(route, n, k, geometry.groups, skip_empty, tile, source)
    stride, classes = geometry.stride, geometry.stride[0] * geometry.stride[1] if transposed else 1
    pixels = -(-OH // (stride[0] if transposed else 1)) * -(-OW // (stride[1] if transposed else 1))
    most = _tiles_at_most(shape, B, pixels, classes, tile.rows, route.mask is not None)
    skip = [s // gcd(s, d) if transposed else 1 for s, d in zip(stride, geometry.dilation, strict=True)]
    arguments |= dict(
        source=source, weight=weight, levels=route.levels, B=B, H=H, W=W,
        source_b=instance_stride(source), source_h=source.stride(2), source_w=source.stride(3),
        KC=KC, CARDINALITY=geometry.groups, STRIDE_H=stride[0], STRIDE_W=stride[1], SKIP_H=skip[0], SKIP_W=skip[1],
        N_WIDTHS=shape.n_widths, K_WIDTHS=shape.k_widths, COLUMNS=shape.columns, RUNG=shape.rung,
        BNS=shape.bns, BKS=shape.bks, EVENS=shape.evens, SKIP_EMPTY=skip_empty,
        PRECISION=product, BM=tile.rows, num_warps=tile.warps, num_stages=tile.stages, **selection,
    )  # fmt: skip
    return Launch(convolve_kernel, min(most, tile.programs * multiprocessors), arguments)


def convolve(
    source: Tensor,  # [B, KC, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    out: Tensor,  # [B, NC, OH, OW] channels-last, written where the route selects
    route: Route,
    geometry: Geometry,
    *,
    transposed: bool = False,  # source is the gradient of the output, out that of the input
    skip_empty: bool = False,  # leave instances at level 0 alone where out is not elastic
    epilogue: Epilogue = PLAIN,
) -> None:
    """Convolve each instance over the channel groups that it selected, in one launch; the host waits for nothing."""
    if source.shape[0] == 0 or out.numel() == 0:
        return
    check_pixels(source, out)
    launch = convolution_launch(
        channels_last(source), dense(weight), out, route, geometry, transposed, skip_empty, epilogue,
        *architecture(source.device),
    )  # fmt: skip
    launch.run(source)
