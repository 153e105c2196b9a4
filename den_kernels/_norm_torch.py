"""Batch norm over the channels in use in PyTorch operations: any device, any dtype; gradients have gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import channels_of


class _AllReduceSum(torch.autograd.Function):
    """The sum over the processes of a group; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, process_group: dist.ProcessGroup) -> Tensor:  # values, result [...]
        ctx.process_group = process_group
        total = values.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # grad [...], as values
        return _AllReduceSum.apply(grad, ctx.process_group), None


def all_reduce(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `values` [...] over the processes of a group; without a group, `values` itself."""
    return values if process_group is None else _AllReduceSum.apply(values, process_group)


def _per_channel(values: Tensor) -> Tensor:  # [C] -> [C, 1, 1]
    return values[:, None, None]


def check_counts(count: Tensor, shape: torch.Size) -> None:
    """Raise ValueError where a channel of x, of this shape [B, C, H, W], has a single value: a 1 in count [C]."""
    if shape[2:] == (1, 1) and bool((single := count == 1).any()):
        raise ValueError(
            "dynamic_batch_norm: a channel in use must have more than one value while training, got one value of "
            f"channel {int(single.nonzero()[0])} in x of shape {list(shape)}"
        )


def norm_torch(
    x: Tensor,  # [B, C, H, W]
    selection: Tensor,  # bool [B, G]
    statistics: Tensor | None,  # [3, C] mean, variance, count; None: those of the batch
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    groups: Sequence[int],
    eps: float,
    relu: bool,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # [B, C, H, W], [3, C]
    """The normalised map, 0 in channels that an instance does not use, and the statistics that it took."""
    used = channels_of(selection, groups)[:, :, None, None]
    values = torch.where(used, x.to(torch.promote_types(x.dtype, torch.float32)), 0)
    if statistics is None:
        count = (used.sum(0) * (x.shape[2] * x.shape[3])).flatten().to(values.dtype)
        total, count = all_reduce(torch.stack([values.sum((0, 2, 3)), count]), process_group)
        n = count.clamp(min=1)
        mean = total / n
        centred = torch.where(used, values - _per_channel(mean), 0)
        var = all_reduce(centred.square().sum((0, 2, 3)), process_group) / n
        statistics = torch.stack([mean, var, count])
    else:
        mean, var, _ = statistics
        centred = torch.where(used, values - _per_channel(mean), 0)
    scale = torch.rsqrt(var + eps)
    y = centred * _per_channel(scale if weight is None else scale * weight)
    if bias is not None:
        y = y + _per_channel(bias)
    return torch.where(used, y.relu() if relu else y, 0).to(x.dtype), statistics.detach()


def norm_torch_gradients(
    dy: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    selection: Tensor,  # bool [B, G]
    statistics: Tensor | None,  # [3, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    settings: tuple[Sequence[int], float, bool],  # groups, eps, relu
    wanted: Sequence[bool],  # of the gradients of x, weight and bias
) -> list[Tensor | None]:
    """The gradients of :func:`norm_torch`, which have gradients themselves; None where not wanted."""
    own = [None if t is None else t.view_as(t) for t in (x, weight, bias)]  # weight may be a function of x
    assert own[0] is not None
    y, _ = norm_torch(own[0], selection, statistics, own[1], own[2], *settings)
    asked = [t for t, needed in zip(own, wanted, strict=True) if t is not None and needed]
    made = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
    return [next(made) if needed else None for needed in wanted]
