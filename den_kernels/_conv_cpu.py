"""Dynamic convolution on a CPU: the instances of a segment together, through oneDNN, over the channels they selected.

Per segment of the route: gather the selected input channels of its instances (`rows.py`), slice the weight, convolve,
scatter the result. A level selects a prefix, so its weight is a view; only a mask with a hole concatenates the slices
of its groups, once per distinct mask. A segment of neighbouring instances in order that reads every channel is a
view of the batch, and one that holds the whole batch and writes every channel hands its result over without a copy.
The backward pass walks the same segments in the same order, so it is deterministic.

One tap on maps of one pixel, a fully connected layer, is a product of matrices and goes to BLAS: oneDNN would lay out
its weights anew in every call.

Many a CPU has a faster way, the direct convolution of `_conv_direct.py`.

float16 is computed in float32. Weight and bias gradients are added up over the segments in float32, or in float64 if
they are float64.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._conv_parts import ChannelRange, Part, SegmentPart
from ._geometry import Geometry, compute_dtype, is_product, memory_format_of
from .rows import gather_rows, scatter_rows_


def _packed(x: Tensor) -> tuple[Tensor, int]:
    """x [B, C, H, W] as `rows.py` takes it, and the elements of a channel there.

    Channels-last: x and 1. Contiguous: [B, C * H * W, 1, 1] and H * W.
    """
    if not (x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()):
        x = x.contiguous(memory_format=memory_format_of(x))
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, 1
    return x.view(x.shape[0], -1, 1, 1), x.shape[2] * x.shape[3]


def gather(
    x: Tensor,  # [B, C, H, W]
    segment: SegmentPart,
    ranges: Sequence[ChannelRange],
    dtype: torch.dtype,
) -> Tensor:  # [n, width, H, W] in x's memory format
    """The channels of `ranges` of a segment's instances."""
    n = segment.order.shape[0]
    if segment.first >= 0 and ranges[0].width == x.shape[1]:
        return x.narrow(0, segment.first, n).to(dtype)
    packed, unit = _packed(x)
    taken = []
    for start, width in ranges:
        rows = gather_rows(packed, segment.order, width * unit, dtype=dtype, start=start * unit)
        taken.append(rows.reshape(n, width, *x.shape[2:]))
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)


def scatter_(
    out: Tensor,  # [B, C, H, W] without gaps in memory
    rows: Tensor,  # [n, width, H, W]
    segment: SegmentPart,
    ranges: Sequence[ChannelRange],
) -> None:
    """Write the channels of `rows` into `ranges` of a segment's instances in out."""
    n = segment.order.shape[0]
    if segment.first >= 0 and ranges[0].width == out.shape[1]:
        out.narrow(0, segment.first, n).copy_(rows)
        return
    packed, unit = _packed(out)
    format = torch.channels_last if unit == 1 else torch.contiguous_format
    taken = 0
    for start, width in ranges:
        block = rows.narrow(1, taken, width).contiguous(memory_format=format)
        scatter_rows_(packed, block.view(n, -1, 1, 1) if unit > 1 else block, segment.order, start=start * unit)
        taken += width


def allocate(
    shape: Sequence[int], dtype: torch.dtype, format: torch.memory_format, written: Iterable[Sequence[ChannelRange]]
) -> Tensor:
    """Memory for a result, uninitialised if the segments write all of its channels, else zeroed.

    One pass over the whole is faster than many over the parts that stay empty.
    """
    out = torch.empty(shape, dtype=dtype, memory_format=format)
    if any(sum(range_.width for range_ in ranges) < shape[1] for ranges in written):
        out.zero_()
    return out


def fill_(out: Tensor, segment: SegmentPart, ranges: Sequence[ChannelRange], bias: Tensor | None) -> None:
    """Write the bias (float [C]; None: zero) into channels `ranges` of a segment's instances in out [B, C, H, W]."""
    for start, width in ranges:
        value = out.new_zeros(1) if bias is None else bias.narrow(0, start, width).to(out.dtype)
        for instance in segment.order.tolist():  # a fifth of the time that one indexed assignment takes
            out[instance].narrow(0, start, width).copy_(value.view(-1, 1, 1))


def _take(x: Tensor, dim: int, ranges: Sequence[ChannelRange]) -> Tensor:  # [..., C, ...] -> [..., width, ...]
    if ranges[0].width == x.shape[dim]:
        return x
    slices = [x.narrow(dim, *range_) for range_ in ranges]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim)


def _weight_of(weight: Tensor, part: Part, geometry: Geometry) -> Tensor:
    """The part of weight [C_out, C_in / groups, R, S] that a selection multiplies with."""
    taken = _take(weight, 0, part.outputs)
    return taken if geometry.groups > 1 else _take(taken, 1, part.inputs)


def _convolve(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    segment: SegmentPart,
    geometry: Geometry,
) -> Tensor:  # [n, channels of part.outputs, H_out, W_out] in the dtype of weight
    part = segment.part
    rows, taken = gather(x, segment, part.inputs, weight.dtype), _weight_of(weight, part, geometry)
    bias = None if bias is None else _take(bias, 0, part.outputs)
    if is_product(x, weight, geometry):
        return F.linear(rows.flatten(1), taken.flatten(1), bias)[:, :, None, None]
    return torch.convolution(
        rows, taken, bias, geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), part.groups
    )


def is_plain(parts: Sequence[SegmentPart], out_channels: int) -> bool:
    """True where one ordinary convolution does it all: the whole batch, in its order, every output channel."""
    return len(parts) == 1 and parts[0].first == 0 and parts[0].part.outputs == (ChannelRange(0, out_channels),)


def forward(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    parts: Sequence[SegmentPart],
    geometry: Geometry,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Convolve the segments one after the other. x is read where it is selected, and nowhere else."""
    dtype, format = compute_dtype(x), memory_format_of(x, weight)
    if dtype != x.dtype:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    product = is_product(x, weight, geometry)  # whose result has not the strides of a convolution's
    if is_plain(parts, weight.shape[0]) and not product:
        return _convolve(x, weight, bias, parts[0], geometry).to(x.dtype).contiguous(memory_format=format)
    written = (segment.part.outputs + segment.part.constant for segment in parts)
    out = allocate(geometry.out_shape(x, weight), x.dtype, format, written)
    for segment in parts:
        if segment.part.outputs:
            scatter_(out, _convolve(x, weight, bias, segment, geometry), segment, segment.part.outputs)
        fill_(out, segment, segment.part.constant, bias)
    return out


class _Sums:
    """The gradients of weight [C_out, C_in / groups, R, S] and bias [C_out], added up over the segments."""

    def __init__(
        self,
        weight: Tensor,  # [C_out, C_in / groups, R, S]
        groups: int,
        output_mask: Sequence[bool],  # [3]: which of the gradients of x, weight and bias are wanted
    ) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.groups = groups
        self.weight = self.bias = None
        if output_mask[1]:
            self.weight = torch.zeros_like(weight, dtype=self.dtype, memory_format=memory_format_of(weight))
        if output_mask[2]:
            self.bias = torch.zeros(weight.shape[0], dtype=self.dtype)

    def add_weight(self, part: Part, dweight: Tensor) -> None:  # [outputs, inputs of the part, R, S]
        assert self.weight is not None
        columns = part.inputs if self.groups == 1 else (ChannelRange(0, dweight.shape[1]),)
        for rows, out_taken in _with_offsets(part.outputs):
            for range_, in_taken in _with_offsets(columns):
                block = dweight.narrow(0, out_taken, rows.width).narrow(1, in_taken, range_.width)
                self.weight.narrow(0, *rows).narrow(1, *range_).add_(block)

    def add_bias(self, ranges: Sequence[ChannelRange], dbias: Tensor) -> None:  # [channels of ranges]
        assert self.bias is not None
        for range_, taken in _with_offsets(ranges):
            self.bias.narrow(0, *range_).add_(dbias.narrow(0, taken, range_.width))


def _with_offsets(ranges: Sequence[ChannelRange]) -> Iterator[tuple[ChannelRange, int]]:
    """Each range, and the number of channels in the ranges before it."""
    taken = 0
    for range_ in ranges:
        yield range_, taken
        taken += range_.width


def backward(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    parts: Sequence[SegmentPart],
    geometry: Geometry,
    output_mask: Sequence[bool],  # [3]: which of the gradients are wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, segment by segment; None where `output_mask` does not ask for one."""
    dtype = compute_dtype(x)
    sums, dx = _Sums(weight, geometry.groups, output_mask), None
    if output_mask[0]:
        dx = allocate(x.shape, x.dtype, memory_format_of(x), (segment.part.inputs for segment in parts))
    weight_dtype, weight = weight.dtype, weight.to(dtype)
    for segment in parts:
        part = segment.part
        if part.outputs:
            gradients = _segment_backward(grad, x, weight, segment, geometry, output_mask)
            if dx is not None:
                scatter_(dx, gradients[0], segment, part.inputs)
            if output_mask[1]:
                sums.add_weight(part, gradients[1])
            if output_mask[2]:
                sums.add_bias(part.outputs, gradients[2])
        if output_mask[2] and part.constant:
            sums.add_bias(part.constant, gather(grad, segment, part.constant, sums.dtype).sum((0, 2, 3)))
    dweight, dbias = (None if total is None else total.to(weight_dtype) for total in (sums.weight, sums.bias))
    return dx, dweight, dbias


def _segment_backward(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    segment: SegmentPart,
    geometry: Geometry,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # of what the segment reads of x and weight, and writes of bias
    part, dtype = segment.part, weight.dtype
    if output_mask[1]:
        rows = gather(x, segment, part.inputs, dtype)
    else:  # only its shape is looked at
        shape = segment.order.shape[0], sum(range_.width for range_ in part.inputs), *x.shape[2:]
        rows = torch.empty(shape, dtype=dtype, memory_format=memory_format_of(x))
    given, taken = gather(grad, segment, part.outputs, dtype), _weight_of(weight, part, geometry)
    if is_product(x, weight, geometry):
        return _product_backward(given.flatten(1), rows.flatten(1), taken.flatten(1), output_mask)
    if rows.shape[0] == 1:  # its batch may have any stride, from which torch 2.13 takes the maps of groups wrongly
        rows = rows.as_strided(rows.shape, (rows.numel(), *rows.stride()[1:]))
    return convolution_backward(given, rows, taken, geometry._replace(groups=part.groups), output_mask)


def convolution_backward(
    grad: Tensor,  # [B, C_out, H_out, W_out]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    geometry: Geometry,
    output_mask: Sequence[bool],  # [3]: which of the gradients are wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias of an ordinary convolution, by PyTorch; undefined where not wanted.

    Where a kernel of one tap has a stride, the pixels that it reads are taken first: for bfloat16 weights of fewer than
    16 input channels oneDNN 3.12 writes beyond its memory there.
    """
    (down, right), (H, W), memory_format = geometry.stride, x.shape[2:], memory_format_of(x)
    strided = tuple(weight.shape[2:]) == (1, 1) and (down, right) != (1, 1) and not any(geometry.padding)
    if strided:
        x = x[:, :, ::down, ::right].contiguous(memory_format=memory_format)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], (1, 1) if strided else geometry.stride, geometry.padding, geometry.dilation,
        False, (0, 0), geometry.groups, output_mask,
    )  # fmt: skip
    if strided and output_mask[0]:
        columns = dx.new_zeros(*dx.shape[:3], W).slice_scatter(dx, 3, step=right)
        dx = dx.new_zeros(*dx.shape[:2], H, W).slice_scatter(columns, 2, step=down)
        dx = dx.contiguous(memory_format=memory_format)
    return dx, dweight, dbias


def _product_backward(
    grad: Tensor,  # [n, O]
    rows: Tensor,  # [n, I]
    weight: Tensor,  # [O, I]
    output_mask: Sequence[bool],  # [3]: which of the gradients are wanted
) -> tuple[Tensor, Tensor, Tensor]:  # [n, I, 1, 1], [O, I, 1, 1], [O]
    """The gradients of rows, weight and bias of a product `rows @ weight.T + bias`; not wanted: empty."""
    nothing = grad.new_empty(0)
    dx = (grad @ weight)[:, :, None, None] if output_mask[0] else nothing
    dweight = (grad.T @ rows)[:, :, None, None] if output_mask[1] else nothing
    return dx, dweight, grad.sum(0) if output_mask[2] else nothing
