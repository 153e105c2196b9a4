"""Batch norm of a batch whose instances use different channels.

Channel c of instance b is *used* when the route selects the group that c lies in. While training, with U(c) the
instances that use c and n(c) = |U(c)| * H * W,

    mean(c) = sum over U(c), H, W of x / n(c),    var(c) = sum over U(c), H, W of (x - mean(c))^2 / n(c)
    y[b, c] = relu((x[b, c] - mean(c)) / sqrt(var(c) + eps) * weight(c) + bias(c))  where used, exactly 0 elsewhere.

What x holds in channels that an instance does not use has no effect. With every group selected this is
`torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015, algorithm 1), followed by ReLU if asked.

Four passes do the work, statistics and apply forward, reduce and gradient backward: in C++ on a CPU, in Triton
(`_triton/norm.py`) on a GPU. Where neither runs, and where statistics are shared between processes, PyTorch operations
do. On a GPU nothing is read back from the device.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _triton
from ._extension import extension
from ._geometry import memory_format_of
from ._norm_torch import check_counts, norm_torch, norm_torch_gradients
from .eager import (
    call_op,
    in_range,
    is_ordinary,
    is_traced,
    is_transformed,
    not_scriptable,
    refuse_symbols,
    refuse_tangents,
    runs_eagerly,
    savable,
)
from .plan import Route, as_route, channels_of, route_for


def dynamic_batch_norm_reference(
    x: Tensor,  # [B, C, H, W]
    route: Route | Tensor,  # route, levels [B] or mask [B, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C], updated in place
    running_var: Tensor | None,  # [C], updated in place
    *,
    groups: Sequence[int],
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:  # [B, C, H, W]
    """`dynamic_batch_norm`, one channel after the other."""
    B, C = x.shape[:2]
    used = channels_of(as_route(route, len(groups), B).selection(), groups)
    y = x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)
    for c in range(C):
        users = [b for b in range(B) if used[b, c]]
        if not users:
            continue
        values = x[users, c]
        if training or running_mean is None or running_var is None:
            mean, var = values.mean(), values.var(correction=0)
        else:
            mean, var = running_mean[c], running_var[c]
        if training and running_mean is not None and running_var is not None and values.numel() > 1:
            with torch.no_grad():
                running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean
                running_var[c] = (1 - momentum) * running_var[c] + momentum * values.var(correction=1)
        out = (values - mean) / torch.sqrt(var + eps)
        out = out * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
        y[users, c] = out.relu() if relu else out
    return y


# The four passes, two in each op: C++ on a CPU, Triton on a GPU. All maps are channels-last in memory.


def _norm_forward_cpu(
    x: Tensor,  # [B, C, H, W] float32 or bfloat16; on a GPU also float16
    selection: Tensor,  # bool [B, G]
    statistics: Tensor | None,  # float32 [3, C] mean, biased variance, count; None: those of the batch
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    groups: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:  # channels-last, float32 [3, C]
    x, selection = x.contiguous(memory_format=torch.channels_last), selection.contiguous()
    weight, bias = (None if vector is None else vector.float().contiguous() for vector in (weight, bias))
    batch = extension.NormBatch(x, selection, groups)
    if statistics is None:
        statistics = torch.empty(3, x.shape[1])
        extension.norm_statistics(batch, x, statistics)
        if x.shape[2:] == (1, 1):
            check_counts(statistics[2], x.shape)
    else:
        statistics = statistics.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(x)
    extension.norm_apply(batch, extension.NormAffine(batch, statistics, weight, bias, eps, relu), x, y)
    return y, statistics


_NAME = "den_kernels::dynamic_norm"
_norm_forward = torch.library.custom_op(_NAME, mutates_args=(), device_types="cpu")(_norm_forward_cpu)
_norm_forward.register_fake(lambda x, *_: (
    torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(3, x.shape[1], dtype=torch.float32)
))  # fmt: skip


def _norm_backward_cpu(
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
    dy, x = (maps.contiguous(memory_format=torch.channels_last) for maps in (dy, x))
    weight, bias = (None if vector is None else vector.float().contiguous() for vector in (weight, bias))
    selection = selection.contiguous()
    batch = extension.NormBatch(x, selection, groups)
    affine = extension.NormAffine(batch, statistics, weight, bias, eps, relu)
    sums, dx = torch.empty(2, x.shape[1]), torch.empty_like(x) if need_dx else x.new_empty(0)
    if need_sums or training:
        extension.norm_reduce(batch, affine, dy, x, sums)
    if need_dx:
        extension.norm_gradient(batch, affine, dy, x, sums if training else None, dx)
    return dx, sums if need_sums else sums.new_empty(0)


_norm_backward = torch.library.custom_op(f"{_NAME}_backward", mutates_args=(), device_types="cpu")(_norm_backward_cpu)


@_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:  # [B, C, H, W], float32 [2, C]
    need_dx, need_sums = settings[-2:]
    sums = x.new_empty((2, x.shape[1]) if need_sums else (0,), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last) if need_dx else x.new_empty(0), sums


_KERNELS = "den_kernels._triton.norm"  # imported where they run
_norm_forward.register_kernel("cuda", lambda *arguments: import_module(_KERNELS).forward(*arguments))
_norm_backward.register_kernel("cuda", lambda *arguments: import_module(_KERNELS).backward(*arguments))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for the backward pass what `_gradients` reads; output: [B, C, H, W] and the statistics [3, C]."""
    x, selection, given, weight, bias, *ctx.settings = inputs
    ctx.training = given is None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, *savable(selection), output[1], weight, bias)


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # dy [B, C, H, W]
    x, selection, statistics, weight, bias = ctx.saved_tensors
    need_dx, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph: the gradients may have to have gradients
        given, wanted = None if ctx.training else statistics, (need_dx, need_weight, need_bias)
        dx, dweight, dbias = norm_torch_gradients(dy, x, selection, given, weight, bias, tuple(ctx.settings), wanted)
        return dx, None, None, dweight, dbias, None, None, None
    needs = need_dx, need_weight or need_bias
    arguments = dy, x, selection, statistics, weight, bias, *ctx.settings, ctx.training, *needs
    if x.is_cpu and is_ordinary(dy, x, weight, bias):
        dx, sums = in_range(f"{_NAME}_backward", _norm_backward_cpu, *arguments)
    else:
        dx, sums = _norm_backward(*arguments)
    dweight = sums[1].to(weight.dtype) if need_weight else None
    dbias = sums[0].to(bias.dtype) if need_bias else None
    return dx if need_dx else None, None, None, dweight, dbias, None, None, None


_norm_forward.register_autograd(_gradients, setup_context=_save)


class _EagerNorm(torch.autograd.Function):
    """The op on a CPU for ordinary tensors, without the overhead of a call through torch.library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # with a setup_context calls take longer
        output = _norm_forward_cpu(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def _check(x: Tensor, groups: Sequence[int], eps: float, **vectors: Tensor | None) -> None:
    """Raise unless x is [B, C, H, W], floating point, groups add up to C and the vectors are [C] on its device."""
    if x.dim() != 4:
        raise ValueError(f"dynamic_batch_norm: x must be [B, C, H, W], got shape {list(x.shape)}")
    if eps < 0:
        raise ValueError(f"dynamic_batch_norm: eps must be at least 0, got {eps}")
    if not x.is_floating_point():
        raise TypeError(f"dynamic_batch_norm: x must be a floating point tensor, got {x.dtype}")
    C = x.shape[1]
    if sum(groups) != C or min(groups, default=0) < 0:
        raise ValueError(f"dynamic_batch_norm: groups must add up to the {C} channels of x, got {list(groups)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (C,):
            raise ValueError(f"dynamic_batch_norm: {name} must be [{C}], got shape {list(vector.shape)}")
        if vector is not None and vector.device != x.device:
            raise ValueError(f"dynamic_batch_norm: {name} must be on {x.device} like x, got {vector.device}")
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("dynamic_batch_norm: running_mean and running_var must be both tensors or both None")


def _has_kernels(x: Tensor) -> bool:  # x [B, C, H, W]
    in_cpp = extension is not None and x.dtype in (torch.float32, torch.bfloat16)
    return in_cpp if x.is_cpu else _triton.takes(x)


def _normed(
    x: Tensor,  # [B, C, H, W]
    arguments: tuple[Any, ...],  # selection, statistics, weight, bias, groups, eps, relu: as of `_norm_forward_cpu`
    ordinary: bool,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:  # [B, C, H, W], float32 (of float64 float64) [3, C]
    """Result and statistics, by the kernels of x's device where these run, else by operations of PyTorch."""
    selection, statistics, weight, bias, groups, eps, relu = arguments
    if not _has_kernels(x) or process_group is not None or (not ordinary and is_transformed()):
        y, batch = norm_torch(x, selection, statistics, weight, bias, groups, eps, relu, process_group)
        if statistics is None and x.is_cpu and process_group is None and not is_traced():
            check_counts(batch[2], x.shape)
        return y, batch
    maps = x.contiguous(memory_format=torch.channels_last)
    if not (x.is_cpu and ordinary):
        return call_op(_norm_forward, maps, *arguments)
    # of the least overhead: the plain function, or an autograd function
    function = _norm_forward_cpu if runs_eagerly(x, weight, bias) else _EagerNorm.apply
    return in_range(_NAME, function, maps, *arguments)


@torch.no_grad()
def _update_running(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float | Tensor) -> None:
    """Move the running statistics [C] towards the batch's, [3, C], in channels of which it has two values or more."""
    mean, var, count = statistics
    weight, unbiased = (count > 1).to(mean.dtype) * momentum, var * (count / (count - 1).clamp(min=1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(running.to(batch.dtype).lerp(batch, weight))


@not_scriptable
def dynamic_batch_norm(
    x: Tensor,  # [B, C, H, W]
    route: Route | Tensor,  # route, levels [B] or mask [B, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C], updated in place while training
    running_var: Tensor | None,  # [C], updated in place while training
    *,
    groups: Sequence[int],
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [B, C, H, W], dtype and memory format of x
    """Batch norm, then ReLU if `relu`, of the channels that each instance uses; the others are exactly 0.

    With every group selected equivalent to `F.batch_norm(x, running_mean, running_var, weight, bias, training,
    momentum, eps)`. `route` is a Route, levels (integer [B]) or a mask (bool [B, G]); `groups` are the G sizes of the
    channel groups. What x holds in channels that an instance does not use has no effect.

    While training, or without running statistics, a channel's moments come from the instances that use it. Its running
    mean and (unbiased) variance move by `momentum`, a number or a tensor without dimensions, if the batch has at least
    two values of it. With `process_group`, sums and counts run over all processes of the group, also in the gradient.

    Any floating point dtype; sums in float32, of float64 in float64. Raises ValueError on shapes, groups or devices
    that do not fit, TypeError on dtypes that do not, and ValueError for a channel in use with a single value while
    training, as `F.batch_norm` does, where that can be known without waiting for the device: on a CPU, without a
    process group. Elsewhere such a channel gives its bias.
    """
    if not isinstance(x, Tensor):
        refuse_symbols("dynamic_batch_norm", x)
    _check(x, groups, eps, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    route = route_for(x, route, len(groups), "dynamic_batch_norm")
    ordinary = is_ordinary(x, weight, bias)
    if not ordinary:
        refuse_tangents("dynamic_batch_norm", x, weight, bias)
    statistics = None
    if not training and running_mean is not None and running_var is not None:
        running = torch.stack([running_mean, running_var, torch.ones_like(running_mean)])
        statistics = running.to(torch.promote_types(x.dtype, torch.float32))
    arguments = route.selection(), statistics, weight, bias, list(groups), eps, relu
    y, batch = _normed(x, arguments, ordinary, process_group)
    if training and running_mean is not None and running_var is not None:
        _update_running(running_mean, running_var, batch, momentum)
    return y.contiguous(memory_format=memory_format_of(x)) if ordinary or not is_transformed() else y
