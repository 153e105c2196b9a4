"""Convolution over only the channel groups that each instance selected.

Equivalent to, with `reads` [B, C_in] and `writes` [B, C_out] the channels that an instance's selection holds (all of
them on a side that is not elastic),

    where(writes, conv2d(where(reads, x, 0), weight, bias, ...), 0)

but only the selected part is computed: input channels that are not read may hold anything, NaN included. The channel
groups are those of Deep Elastic Networks (Ahn, Kim and Oh, ICCV 2019, section 3); a mask takes any subset of them.

With `groups > 1` (cardinality) the boundaries of channel groups lie on those of the cardinality groups. The equation
then says: elastic outputs alone read only the inputs of their own cardinality groups, and an output whose inputs are
not selected (elastic inputs alone, or both sides with different sizes) is its bias.

On a CPU the instances of a level run together, or all instances through one direct convolution (`_conv_cpu.py`,
`_conv_direct.py`); float64 runs the reference, its gradients excepted. On a GPU one launch of a Triton kernel computes
the selected part (`_triton/`), without waiting for the device; inputs that are not channels-last, or do not begin at a
multiple of 16 bytes, are copied first. Where that kernel does not run (float64, no triton, before compute capability
8.0) the equation itself is computed, the whole convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _conv_cpu, _conv_direct, _triton
from ._conv_masked import equation, masked_backward, masked_forward
from ._conv_parts import parts_of
from ._geometry import FIELDS, Geometry, memory_format_of, operands, settle, sides
from ._operands import ROUTE
from .eager import (
    call_op,
    in_range,
    is_ordinary,
    is_transformed,
    not_scriptable,
    refuse_symbols,
    refuse_tangents,
    runs_eagerly,
    savable,
)
from .plan import Route, as_route, channels_of, route_for


def dynamic_conv2d_reference(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    selection: Route | Tensor,  # levels [B], mask [B, G] or route
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    out_groups: Sequence[int] = (),  # () or [G]
    in_groups: Sequence[int] = (),  # () or [G]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """`dynamic_conv2d`, one instance and one cardinality group after the other, with sliced weights."""
    (B, C_in), C_out = x.shape[:2], weight.shape[0]
    selected = as_route(selection, len(out_groups) or len(in_groups), B).selection()
    reads = channels_of(selected, in_groups, C_in).tolist()
    writes = channels_of(selected, out_groups, C_out).tolist()
    shape = F.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding, dilation, groups).shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x, weight)).zero_()
    ins, outs = C_in // groups, C_out // groups
    for b in range(B):
        for k in range(groups):
            used = [c for c in range(ins) if reads[b][k * ins + c]]
            made = [c for c in range(k * outs, (k + 1) * outs) if writes[b][c]]
            if used and made:
                x_used = x[b : b + 1, [k * ins + c for c in used]]
                out[b, made] = F.conv2d(x_used, weight[made][:, used], None, stride, padding, dilation)[0]
            if bias is not None and made:
                out[b, made] = out[b, made] + bias[made, None, None]
    return out


def compute(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    route: Route,
    geometry: Geometry,
    packed: Callable[[torch.dtype], Tensor] | None = None,  # gives the weight packed for the direct convolution
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The convolution by the kernels of x's device, without autograd; arguments were checked."""
    if not x.is_cpu:
        if _triton.takes(x):
            from ._triton import dynamic_conv as kernels

            return kernels.forward(x, weight, bias, route, geometry)
        return masked_forward(x, weight, bias, route, geometry)
    if x.dtype == torch.float64:
        return dynamic_conv2d_reference(
            x, weight, bias, route, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation,
            groups=geometry.groups, out_groups=geometry.out_sizes, in_groups=geometry.in_sizes,
        )  # fmt: skip
    if not _conv_direct.runs_direct(x, weight, geometry, packed is not None, route):
        parts = parts_of(route, geometry, x.shape[1], weight.shape[0])
        return _conv_cpu.forward(x, weight, bias, parts, geometry)
    own = packed(x.dtype) if packed else _conv_direct.pack_anew(weight, geometry.in_sizes)
    shape = geometry.out_shape(x, weight)
    out = _conv_direct.forward(x, own, weight.shape[2:], bias, route, shape, geometry)
    if memory_format_of(x, weight) == torch.channels_last:
        return out
    return torch.empty(shape, dtype=x.dtype).copy_(out)  # contiguous() would leave strides that could be either


def route_of(tensors: Sequence[Tensor], geometry: Geometry) -> Route:
    """The route of these tensors: levels [B], order [B], offsets [S + 1], mask [B, G] or None."""
    levels, order, offsets, mask = tensors
    return Route(levels, order, offsets, len(geometry.out_sizes) or len(geometry.in_sizes), mask)


def _forward(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    *given: Any,  # the tensors of a route, and the fields of a geometry
) -> Tensor:  # [B, C_out, H_out, W_out]
    geometry = Geometry.of(*given[4:])
    return compute(x, weight, bias, route_of(given[:4], geometry), geometry)


_NAME, _GIVEN = "den_kernels::dynamic_conv2d", f"{ROUTE}, {FIELDS}"
_dynamic_conv2d = torch.library.custom_op(
    _NAME, _forward, mutates_args=(), schema=f"(Tensor x, Tensor weight, Tensor? bias, {_GIVEN}) -> Tensor"
)


@_dynamic_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> Tensor:
    """Memory for the result, [B, C_out, H_out, W_out], as torch.compile needs to know it."""
    shape = Geometry.of(*given[4:]).out_shape(x, weight)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x, weight))


def _backward_cpu(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    route: Route,
    geometry: Geometry,
    output_mask: Sequence[bool],  # [3]: which of the gradients are wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight and bias
    """The gradients by the direct kernels where these run, else segment by segment (`_conv_cpu.py`)."""
    dx, dweight = _conv_direct.gradients(grad, x, weight, route, geometry, output_mask)
    rest = [output_mask[0] and dx is None, output_mask[1] and dweight is None, output_mask[2]]
    if dx is not None:
        dx = dx.contiguous(memory_format=memory_format_of(x))
    if dweight is not None:
        dweight = dweight.contiguous(memory_format=memory_format_of(weight))
    if not any(rest):
        return dx, dweight, None
    parts = parts_of(route, geometry, x.shape[1], weight.shape[0])
    others = _conv_cpu.backward(grad, x, weight, parts, geometry, rest)
    return dx if others[0] is None else others[0], dweight if others[1] is None else others[1], others[2]


def _backward(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    *given: Any,  # as of `_forward`, and which gradients are wanted; the others come back with no element
) -> tuple[Tensor, ...]:  # dx, dweight, dbias
    geometry, output_mask = Geometry.of(*given[4:-1]), given[-1]
    route = route_of(given[:4], geometry)
    gradients: Sequence[Tensor | None]
    if x.is_cpu:
        gradients = _backward_cpu(grad, x, weight, route, geometry, output_mask)
    elif _triton.takes(x):
        from ._triton import dynamic_conv as kernels

        gradients = kernels.backward(grad, x, weight, route, geometry, output_mask)
    else:
        gradients = masked_backward(grad, x, weight, route, geometry, output_mask)
    pairs = zip(gradients, output_mask, strict=True)
    return tuple(x.new_empty(0) if gradient is None or not wanted else gradient for gradient, wanted in pairs)


_dynamic_conv2d_backward = torch.library.custom_op(
    f"{_NAME}_backward", _backward, mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor weight, {_GIVEN}, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_dynamic_conv2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Memory for the gradients of x, weight and bias; of those that are not wanted [0]."""
    dx, dweight = (torch.empty_like(t, dtype=x.dtype, memory_format=memory_format_of(t)) for t in (x, weight))
    made = dx, dweight, weight.new_empty(weight.shape[0])
    return tuple(m if wanted else x.new_empty(0) for m, wanted in zip(made, given[-1], strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # output [B, C_out, H_out, W_out]
    x, weight, _, *routing = inputs[:7]
    ctx.geometry, ctx.inputs = Geometry.of(*inputs[7:]), len(inputs)
    ctx.save_for_backward(x, weight, *savable(*routing))  # with versions: a plan's update_ is noticed


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad [B, C_out, H_out, W_out]
    x, weight, levels, order, offsets, mask = ctx.saved_tensors
    geometry, wanted = ctx.geometry, list(ctx.needs_input_grad[:3])
    route = Route(levels, order, offsets, len(geometry.out_sizes) or len(geometry.in_sizes), mask)
    if torch.is_grad_enabled():  # create_graph: the gradients may have to have gradients
        gradients = masked_backward(grad, x, weight, route, geometry, wanted)
    elif x.is_cpu and is_ordinary(grad, x, weight):
        gradients = in_range(f"{_NAME}_backward", _backward_cpu, grad, x, weight, route, geometry, wanted)
    else:
        gradients = _dynamic_conv2d_backward(grad, x, weight, levels, order, offsets, mask, *geometry, wanted)
    kept = [gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)]
    return *kept, *(None,) * (ctx.inputs - len(kept))


_dynamic_conv2d.register_autograd(_gradients, setup_context=_save)


class _EagerConv(torch.autograd.Function):
    """The op on a CPU for ordinary tensors, without the overhead of calls through torch.library."""

    @staticmethod
    def forward(  # with a setup_context each call would look at the signature
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, route: Route, geometry: Geometry
    ) -> Tensor:
        ctx.geometry, ctx.inputs = geometry, 5
        ctx.save_for_backward(x, weight, *savable(route.levels, route.order, route.offsets, route.mask))
        return compute(x, weight, bias, route, geometry)

    backward = staticmethod(_gradients)


@not_scriptable
def dynamic_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None = None,  # [C_out]
    selection: Route | Tensor | None = None,  # levels [B], mask [B, G] or route
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    out_groups: int | Sequence[int] | None = None,
    in_groups: int | Sequence[int] | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Convolve each instance over the channel groups that it selected; `selection=None` is `F.conv2d`.

    x, weight, bias: one dtype of float16 (computed in float32 on a CPU), bfloat16, float32, float64; any strides. The
    result is channels-last in memory if x or weight is, else contiguous. Autocast and autograd work as for `F.conv2d`,
    except that there is no forward-mode derivative. Gradients of gradients, and all inside torch.func, come from the
    equation: the whole convolution is computed. As with `F.conv2d`, the last bits of an instance's result may depend on
    the rest of the batch: one whose instances are all at the highest level is an ordinary convolution, others are not.

    selection: integer levels [B] in 0..G (the first `levels[b]` groups), a bool mask [B, G], or a Route of a plan.
    out_groups, in_groups: the G channel groups of each side, as an int (equal groups) or their sizes; None: that side
    is not elastic. With both, the same selection rules both. An instance that selects nothing gets zeros if its outputs
    are elastic, else the bias.

    Raises ValueError for shapes, devices, groups or selections that do not fit each other, TypeError for wrong dtypes,
    RuntimeError in forward-mode differentiation.
    """
    if selection is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    refuse_symbols("dynamic_conv2d", x)
    x, weight, bias = operands(x, weight, bias, groups)
    sizes = sides(weight.shape[0], x.shape[1], groups, out_groups, in_groups)
    return convolve(x, weight, bias, selection, *settle(weight.shape, stride, padding, dilation, groups, *sizes))


def convolve(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    selection: Route | Tensor,  # levels [B], mask [B, G] or route
    geometry: Geometry,
    border: tuple[int, ...],
    packed: Callable[[torch.dtype], Tensor] | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """`dynamic_conv2d` of `operands` and settings (`settle`) that were checked: what layers call.

    packed: gives the weight, packed for the direct convolution of a dtype, when it is needed.
    """
    route = route_for(x, selection, len(geometry.out_sizes) or len(geometry.in_sizes), "dynamic_conv2d")
    if border:
        x = F.pad(x, border)
    if min(geometry.out_shape(x, weight)[2:]) < 1:
        raise ValueError(
            f"dynamic_conv2d: the dilated kernel {list(weight.shape[2:])} must fit the padded map, got {list(x.shape)}"
        )
    if runs_eagerly(x, weight, bias):
        return in_range(_NAME, compute, x, weight, bias, route, geometry, packed)
    if x.is_cpu and is_ordinary(x, weight, bias):
        return in_range(_NAME, _EagerConv.apply, x, weight, bias, route, geometry)
    refuse_tangents("dynamic_conv2d", x, weight, bias)
    if is_transformed():
        return equation(x, weight, bias, route, geometry)
    return call_op(_dynamic_conv2d, x, weight, bias, route.levels, route.order, route.offsets, route.mask, *geometry)
