"""A sum over processes that has a gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
