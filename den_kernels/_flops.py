"""Floating point operations of the ops, for `torch.utils.flop_counter.FlopCounterMode`: two a multiply-add.

Counted is what the instances selected where that can be read without waiting (a CPU, values that are not fake), else
the whole convolution. As everywhere in torch, batch norm and ReLU count nothing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import dynamic_conv, dynamic_graph, dynamic_norm, plan  # noqa: F401 (the ops)
from ._conv_parts import part_of
from ._operands import Operands
from .dynamic_bottleneck import OPERANDS as BOTTLENECK
from .dynamic_inverted_residual import OPERANDS as INVERTED
from .dynamic_residual import OPERANDS as RESIDUAL
from .plan import Route

_ops = torch.ops.den_kernels


def _selected(levels: Tensor, mask: Tensor | None, groups: int) -> Iterator[tuple[tuple[bool, ...], int]]:
    """Each set of groups that instances selected, and how many did; levels [B], mask [B, G]."""
    selection = levels if mask is None else mask
    if not selection.is_cpu or isinstance(selection, FakeTensor):
        yield (True,) * groups, len(selection)
        return
    rows = levels[:, None] > torch.arange(groups) if mask is None else mask
    yield from Counter(map(tuple, rows.tolist())).items()


def _products(
    weight: Tensor, pixels: int, levels: Tensor, mask: Tensor | None, groups: int, out_sizes: Sequence[int],
    in_sizes: Sequence[int],
) -> int:  # fmt: skip
    """Multiply-adds of a dynamic convolution that writes maps of `pixels`; `groups` is the cardinality.

    weight: [C_out, C_in / groups, R, S]; levels: [B]; mask: [B, G].
    """
    C_out, C_in = weight.shape[0], weight.shape[1] * groups
    total, G = 0, len(out_sizes) or len(in_sizes)
    for selected, count in _selected(levels, mask, G):
        part = part_of(selected, C_in, C_out, groups, tuple(out_sizes), tuple(in_sizes))
        ins, outs = (sum(run.width for run in runs) for runs in (part.inputs, part.outputs))
        total += count * (ins * outs // part.groups if part.groups else 0)
    return total * prod(weight.shape[2:]) * pixels


def _block(names: Operands, operands: tuple) -> tuple[Route, Any]:
    """Route and weights of a block's op."""
    own = operands[: len(names)]
    return names.route(own), names.weights(own)


@register_flop_formula(_ops.dynamic_conv2d, get_raw=True)
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Tensor, order: Tensor, offsets: Tensor,
    mask: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    out_sizes: Sequence[int] | None, in_sizes: Sequence[int] | None, *, out_val: Tensor,
) -> int:  # fmt: skip
    """FLOPs of `dynamic_conv._forward`, whose tensors these are; out_val: [B, C_out, H_out, W_out]."""
    pixels = prod(out_val.shape[2:])
    return 2 * _products(weight, pixels, levels, mask, groups, out_sizes or (), in_sizes or ())


@register_flop_formula(_ops.dynamic_conv2d_backward, get_raw=True)
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, levels: Tensor, order: Tensor, offsets: Tensor, mask: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    out_sizes: Sequence[int] | None, in_sizes: Sequence[int] | None, output_mask: Sequence[bool], *, out_val: Any,
) -> int:  # fmt: skip
    """FLOPs of the gradients of x and weight; grad: [B, C_out, H_out, W_out], the others as in the forward op."""
    once = _products(weight, prod(grad.shape[2:]), levels, mask, groups, out_sizes or (), in_sizes or ())
    return 2 * once * sum(output_mask[:2])


@register_flop_formula([_ops.dynamic_residual, _ops.dynamic_residual_], get_raw=True)
def _residual(x: Tensor, *operands: Any, out_val: Tensor | None) -> int:
    """FLOPs of both convolutions; x: [B, C, H, W], out_val: [B, C_out, H_out, W_out], None in place."""
    route, weights = _block(RESIDUAL, operands)
    pixels, sizes = prod((x if out_val is None else out_val).shape[2:]), weights.groups
    selected = route.levels, route.mask
    return 2 * (
        _products(weights.conv1, pixels, *selected, 1, sizes, ())
        + _products(weights.conv2, pixels, *selected, 1, (), sizes)
    )


@register_flop_formula([_ops.dynamic_bottleneck, _ops.dynamic_bottleneck_], get_raw=True)
def _bottleneck(x: Tensor, *operands: Any, out_val: Tensor | None) -> int:
    """FLOPs of the three convolutions; x: [B, C, H, W], out_val: [B, C_out, H_out, W_out], None in place."""
    route, weights = _block(BOTTLENECK, operands)
    before, after, sizes = prod(x.shape[2:]), prod((x if out_val is None else out_val).shape[2:]), weights.groups
    selected = route.levels, route.mask
    return 2 * (
        _products(weights.conv1, before, *selected, 1, sizes, ())
        + _products(weights.conv2, after, *selected, weights.cardinality, sizes, sizes)
        + _products(weights.conv3, after, *selected, 1, (), sizes)
    )


@register_flop_formula([_ops.dynamic_inverted_residual, _ops.dynamic_inverted_residual_], get_raw=True)
def _inverted(x: Tensor, *operands: Any, out_val: Tensor | None) -> int:
    """FLOPs of all convolutions; x: [B, C, H, W], out_val: [B, C_out, H_out, W_out], None in place."""
    route, weights = _block(INVERTED, operands)
    before, after, sizes = prod(x.shape[2:]), prod((x if out_val is None else out_val).shape[2:]), weights.groups
    parts = (
        (weights.conv1, before, 1, sizes, ()), (weights.conv2, after, sum(sizes), sizes, sizes),
        (weights.squeeze, 1, 1, (), sizes), (weights.excite, 1, 1, sizes, ()), (weights.conv3, after, 1, (), sizes),
    )  # fmt: skip
    return 2 * sum(
        _products(weight, pixels, route.levels, route.mask, cardinality, outs, ins)
        for weight, pixels, cardinality, outs, ins in parts
        if weight is not None
    )


@register_flop_formula(_ops.dynamic_graph, get_raw=True)
def _graph(
    x: Tensor, levels: Tensor, order: Tensor, offsets: Tensor, read_in: Tensor, gates: Tensor, read_out: Tensor,
    weights: Sequence[Tensor], *_: Any, out_val: Tensor,
) -> int:  # fmt: skip
    """FLOPs of the edges that instances keep; x: [B, C, H, W], levels: [B, E], weights: [C, C, R, S] of each edge."""
    pixels = prod(x.shape[2:])
    each = (_products(w, pixels, levels[:, e], None, 1, (w.shape[0],), ()) for e, w in enumerate(weights))
    return 2 * sum(each)


@register_flop_formula([_ops.dynamic_norm, _ops.dynamic_norm_backward, _ops.plan_levels, _ops.plan_masks], get_raw=True)
def _nothing(*_: Any, out_val: Any) -> int:
    return 0
