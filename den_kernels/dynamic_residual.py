"""The residual block at inference, over only the hidden channel groups that each instance selected.

Equivalent, for an instance whose selected hidden channels are `s`, to

    shortcut(x) + conv2[:, s](relu(bn2(conv1[s](relu(bn1(x))))))        and to shortcut(x) where s is empty

(Ahn, Kim, Oh, ICCV 2019, section 3.1; batch norm with running statistics). The batch norms are folded once, when the
weights are prepared: bn1 into an affine map that runs with ReLU while rows are gathered, bn2 into conv1. A block of an
ordinary ResNet (He et al., 2016) is

    relu(shortcut + bn2(conv2[:, s](relu(bn1(conv1[s](x))))))        and relu(shortcut) where s is empty

where x is the output of a ReLU, so that an instance at level 0 keeps what it has.

On a CPU an instance at level 0 is not touched, and the others go one of two ways:

- float32 with AVX-512, bfloat16 with AMX or AVX-512 BF16: a direct convolution in C++ (csrc/dynamic_residual.cpp and
  dynamic_bf16.h) takes an instance through the whole block while its maps stay in one core's cache. One
  packing of the weights serves all levels and masks, and narrow levels (4 or 8 hidden channels) cost what they hold,
  which they do not with oneDNN.
- else: the instances of a segment go through two dense oneDNN convolutions in chunks that stay in the cache; a row is
  read once (gather, bn1, ReLU) and added to once (scatter).

On a GPU the block is one CUDA kernel (csrc/dynamic_residual.cu) whose hidden map never leaves the chip, where
`_cuda.choose_fused` has a layout for it, else two launches of the Triton convolution, behind a
pass that writes relu(bn1(x)) (`_triton/residual.py`).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda, _triton
from ._conv_direct import selections
from .eager import in_range, is_jit_traced, not_scriptable, refuse_symbols, refuse_training, runs_eagerly
from .plan import Route, read_route, route_for
from .residual_weights import ResidualWeights
from .rows import gather_rows, pool_rows, scatter_rows_

_OP = "dynamic_residual"
_NAME = "den_kernels::dynamic_residual"

# Maps of a chunk that should stay in the private caches of the cores between its two convolutions, in bytes.
_CHUNK_BYTES = 6 << 20


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, relu: bool, packed: bool) -> Tensor:
    """The "same" convolution, channels-last. oneDNN's own fused ReLU makes 0 of NaN; a pass in the cache does not."""
    R, S = weight.shape[2:]
    if packed:
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, [R // 2, S // 2], [stride] * 2, [1, 1], 1, "none", [], ""
        )
    else:
        y = F.conv2d(x, weight, bias, stride, (R // 2, S // 2))
    y = y.contiguous(memory_format=torch.channels_last)
    return y.relu_() if relu else y


class Segment(NamedTuple):
    """Instances order[start:end], which run together over one selection of hidden channels."""

    start: int
    end: int
    groups: tuple[bool, ...]


def segments(route: Route) -> list[Segment]:
    """The segments of a route that have work to do, read on the host (CPU routes only)."""
    (offsets, order), G = read_route(route), route.groups
    found = []
    for s, (start, end) in enumerate(pairwise(offsets)):
        if start < end:
            groups = (
                (True,) * (G - s) + (False,) * s if route.mask is None else tuple(route.mask[order[start]].tolist())
            )
            found.append(Segment(start, end, groups))
    return [segment for segment in found if any(segment.groups)]


def chunk_size(instances: int, map_bytes: int) -> int:
    """Instances per chunk: as many as keep the maps in the cache, at least 8 so that a call's cost is spread.

    >>> chunk_size(128, 640 << 10)   # 64 channels, 32 x 32, float32
    9
    """
    return min(instances, max(8, _CHUNK_BYTES // max(map_bytes, 1)))


def _add_branch_direct(x: Tensor, shortcut: Tensor, out: Tensor, route: Route, weights: ResidualWeights) -> None:
    """out = shortcut + branch(x) in C++; `out` may be `shortcut`, and `shortcut` may be `x`."""
    weights.handle(x, shortcut, out, selections(route))


def _add_branch_onednn(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights) -> None:
    """out += branch(x), segment by segment; `out` may be `x`, whose rows are read before they are added to."""
    compute, P_in, P_out = weights.dtype, x.shape[2] * x.shape[3], out.shape[2] * out.shape[3]
    packed = weights.levels if route.mask is None else ()
    whole = None if packed else weights.all_hidden()
    bias2 = None if weights.bias2 is None else weights.bias2.to(compute)
    for start, end, groups in segments(route):
        hidden = weights.hidden(groups, whole) if whole else packed[sum(groups) - 1]
        map_bytes = compute.itemsize * (P_in * x.shape[1] + P_out * (hidden.bias1.shape[0] + out.shape[1]))
        step = chunk_size(end - start, map_bytes)
        for i in range(start, end, step):
            rows = route.order[i : min(i + step, end)]
            relu = weights.scale1 is not None
            a = gather_rows(x, rows, x.shape[1], weights.scale1, weights.shift1, relu, compute)
            h = _convolution(a, hidden.conv1, hidden.bias1, weights.stride, True, hidden.packed)
            y = _convolution(h, hidden.conv2, bias2, 1, False, hidden.packed)
            scatter_rows_(out, y, rows, accumulate=True)


def _add_branch_masked(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights) -> None:
    """The same on any device without reading the route on the host: all channels computed, the others set to zero."""
    R, S = weights.conv1.shape[2:]
    selection = route.selection()
    channels = selection[:, weights.group_of_channel][:, :, None, None]
    used = selection.any(1)[:, None, None, None]
    a = x
    if weights.scale1 is not None and weights.shift1 is not None:
        a = (x * weights.scale1[:, None, None] + weights.shift1[:, None, None]).relu_().to(x.dtype)
    conv1, bias1, conv2, _ = weights.all_hidden()
    h = F.conv2d(a, conv1, bias1, weights.stride, (R // 2, S // 2))
    h = torch.where(channels, h.relu_(), 0)
    bias2 = None if weights.bias2 is None else weights.bias2.to(h.dtype)
    y = F.conv2d(h, conv2, bias2, 1, (conv2.shape[2] // 2, conv2.shape[3] // 2))
    out.add_(torch.where(used, y, 0))


def dynamic_residual_reference(
    x: Tensor, route: Route, weights: ResidualWeights, shortcut: Tensor | None = None
) -> Tensor:
    """The definition: one instance after the other, its hidden channels selected by hand."""
    out = _new_shortcut(x, weights, shortcut)
    selection, whole = route.selection(), weights.all_hidden()
    for b in range(x.shape[0]):
        groups = tuple(selection[b].tolist())
        if any(groups):
            conv1, bias1, conv2, _ = weights.hidden(groups, whole)
            a = x[b : b + 1].to(conv1.dtype)
            if weights.scale1 is not None and weights.shift1 is not None:
                a = (a * weights.scale1[:, None, None] + weights.shift1[:, None, None]).relu().to(conv1.dtype)
            h = F.conv2d(a, conv1, bias1, weights.stride, (conv1.shape[2] // 2, conv1.shape[3] // 2)).relu()
            bias2 = None if weights.bias2 is None else weights.bias2.to(h.dtype)
            out[b] += F.conv2d(h, conv2, bias2, 1, (conv2.shape[2] // 2, conv2.shape[3] // 2))[0].to(out.dtype)
    return out.relu_() if weights.relu else out


def _out_shape(x: Tensor, conv2: Tensor, stride: int) -> tuple[int, int, int, int]:
    """[B, C_out, H_out, W_out]."""
    B, _, H, W = x.shape
    return B, conv2.shape[0], -(-H // stride), -(-W // stride)


def _new_shortcut(x: Tensor, weights: ResidualWeights, shortcut: Tensor | None) -> Tensor:
    """A map of one's own with the shortcut: the given one, else the block's without parameters."""
    if shortcut is None:
        return pool_rows(x, weights.conv2.shape[0], weights.stride)
    return shortcut.clone(memory_format=torch.channels_last)


def _branch(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights) -> Tensor:
    """Add the block's branch of `x` to `out` (which may be `x`), in the way of the device, and the ReLU behind.

    On a GPU an instance at level 0 is not touched, by the ReLU neither.
    """
    layout = _cuda.choose_fused(x, route, weights)  # None on a CPU
    if layout is not None:
        _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=True)
        return out
    if x.dtype in _triton.DTYPES and _triton.runs_on(x.device):
        from ._triton.residual import add_branch

        add_branch(x, out, route, weights)
        return out
    if x.device.type != "cpu":
        _add_branch_masked(x, out, route, weights)
    elif weights.direct is not None:
        _add_branch_direct(x, out, out, route, weights)
    else:
        _add_branch_onednn(x, out, route, weights)
    return out.relu_() if weights.relu else out


def _functional(x: Tensor, route: Route, weights: ResidualWeights, shortcut: Tensor | None = None) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.float64:
        return dynamic_residual_reference(x, route, weights, shortcut)
    if shortcut is not None:
        out = _branch(x, _new_shortcut(x, weights, shortcut), route, weights)
        return out.relu_() if weights.relu else out  # it need not be a ReLU's output, as x is
    if weights.direct is not None and weights.stride == 1 and weights.conv2.shape[0] == x.shape[1]:
        out = torch.empty_like(x)
        _add_branch_direct(x, x, out, route, weights)
        return out.relu_() if weights.relu else out
    layout = _cuda.choose_fused(x, route, weights)
    if layout is not None:
        out = torch.empty(
            _out_shape(x, weights.conv2, weights.stride),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=False)
        return out
    return _branch(x, _new_shortcut(x, weights, None), route, weights)


def _inplace(x: Tensor, route: Route, weights: ResidualWeights) -> None:
    if x.dtype == torch.float64 or not x.is_contiguous(memory_format=torch.channels_last):
        x.copy_(_functional(x, route, weights))
    else:
        _branch(x, x, route, weights)


def _weights_of(operands: tuple, groups: list[int], direct: list[Tensor], stride: int, relu: bool) -> ResidualWeights:
    scale1, shift1, conv1, scale2, bias1, conv2, bias2, group_of_channel = operands
    pair = (direct[0], direct[1]) if direct else None
    sizes = tuple(groups)
    return ResidualWeights(
        scale1, shift1, conv1, scale2, bias1, conv2, bias2, sizes, group_of_channel, stride, relu, direct=pair
    )


@torch.library.custom_op(_NAME, mutates_args=())
def _functional_op(
    x: Tensor,
    levels: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    conv1: Tensor,
    scale2: Tensor,
    bias1: Tensor,
    conv2: Tensor,
    bias2: Tensor | None,
    group_of_channel: Tensor,
    groups: list[int],
    direct: list[Tensor],
    stride: int,
    relu: bool = False,
    shortcut: Tensor | None = None,
) -> Tensor:
    operands = (scale1, shift1, conv1, scale2, bias1, conv2, bias2, group_of_channel)
    route = Route(levels, order, offsets, len(groups), mask)
    return _functional(x, route, _weights_of(operands, groups, direct, stride, relu), shortcut)


@_functional_op.register_fake
def _(x: Tensor, *operands: Any) -> Tensor:
    shape = _out_shape(x, operands[9], operands[14])  # conv2 and the stride
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op(f"{_NAME}_", mutates_args=("x",))
def _inplace_op(
    x: Tensor,
    levels: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    conv1: Tensor,
    scale2: Tensor,
    bias1: Tensor,
    conv2: Tensor,
    bias2: Tensor | None,
    group_of_channel: Tensor,
    groups: list[int],
    direct: list[Tensor],
    relu: bool = False,
) -> None:
    operands = (scale1, shift1, conv1, scale2, bias1, conv2, bias2, group_of_channel)
    route = Route(levels, order, offsets, len(groups), mask)
    _inplace(x, route, _weights_of(operands, groups, direct, 1, relu))


def _operands(route: Route, weights: ResidualWeights) -> tuple:
    return (
        *(route.levels, route.order, route.offsets, route.mask),
        *(weights.scale1, weights.shift1, weights.conv1, weights.scale2, weights.bias1, weights.conv2, weights.bias2),
        weights.group_of_channel,
        list(weights.groups),
        list(weights.direct or ()),
    )


def _check_shortcut(x: Tensor, weights: ResidualWeights, shortcut: Tensor) -> None:
    shape = _out_shape(x, weights.conv2, weights.stride)
    if shortcut.shape != shape or shortcut.device != x.device:
        raise ValueError(
            f"{_OP}: shortcut must be {list(shape)} on {x.device}, got {list(shortcut.shape)} on {shortcut.device}"
        )
    if shortcut.dtype != x.dtype:
        raise TypeError(f"{_OP}: shortcut must be {x.dtype} as x is, got {shortcut.dtype}")


def _checked(x: Tensor, selection: Route | Tensor, weights: ResidualWeights, shortcut: Tensor | None = None) -> Route:
    refuse_symbols(_OP, x)
    C = weights.conv1.shape[1]
    if x.dim() != 4 or x.shape[1] != C or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{_OP}: x must be [B, {C}, H, W] with H and W of at least 1, got {list(x.shape)}")
    if x.device != weights.conv1.device:
        raise ValueError(f"{_OP}: x must be on {weights.conv1.device} as the weights are, got {x.device}")
    if x.dtype != weights.conv1.dtype:
        raise TypeError(f"{_OP}: x must have the weights' dtype {weights.conv1.dtype}, got {x.dtype}")
    if shortcut is not None:
        _check_shortcut(x, weights, shortcut)
    return route_for(x, selection, len(weights.groups), _OP)


@not_scriptable
def dynamic_residual(
    x: Tensor, selection: Route | Tensor, weights: ResidualWeights, shortcut: Tensor | None = None
) -> Tensor:
    """A residual block at inference, over the hidden channel groups that each instance selected.

    Args:
        x: [B, C, H, W] float32, float16, bfloat16 (float64 runs the reference); channels-last in memory is fastest. Of
            a post-activation block the output of a ReLU.
        selection: a `Route` of a plan, levels (integer [B]) or a mask (bool [B, G]).
        weights: the folded block, `ResidualWeights.fold(conv1, bn1, conv2, bn2)`.
        shortcut: [B, C_out, H_out, W_out] in x's dtype, of a block whose shortcut has parameters; None: average pooling
            of x by the stride, zero channels added.

    Returns:
        [B, C_out, H_out, W_out] channels-last, with H_out = ceil(H / stride): the shortcut plus the branch, through
        ReLU if the block is post-activation. An instance at level 0 gets exactly the shortcut (through ReLU).

    Raises:
        ValueError: x or shortcut of another shape or device, a selection that does not fit, a gradient is required.
        TypeError: x of another dtype than the weights, shortcut of another than x.
    """
    route = _checked(x, selection, weights, shortcut)
    if runs_eagerly(x, shortcut):
        return in_range(_NAME, _functional, x, route, weights, shortcut)
    refuse_training(_OP, x=x, shortcut=shortcut)
    return _functional_op(x, *_operands(route, weights), weights.stride, weights.relu, shortcut)


@not_scriptable
def dynamic_residual_(x: Tensor, selection: Route | Tensor, weights: ResidualWeights) -> Tensor:
    """:func:`dynamic_residual`, in place where the block keeps the shape of `x`; else the new map is returned.

    In place, an instance at level 0 costs nothing: none of its bytes is read or written (of a post-activation block,
    whose ReLU would change none of them, on a GPU).
    """
    if weights.stride != 1 or weights.conv2.shape[0] != x.shape[1]:
        return dynamic_residual(x, selection, weights)
    route = _checked(x, selection, weights)
    if runs_eagerly(x):
        in_range(f"{_NAME}_", _inplace, x, route, weights)
        return x
    refuse_training(_OP, x=x)
    if is_jit_traced():  # the old ONNX exporter drops ops that return nothing
        return x.copy_(_functional_op(x, *_operands(route, weights), weights.stride, weights.relu))
    _inplace_op(x, *_operands(route, weights), weights.relu)
    return x
