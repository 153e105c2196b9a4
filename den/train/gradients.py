"""Means of gradients over the processes of a run, taken while the backward pass still runs, and shared batch norms."""

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from den.nn.ends import FeatureNorm
from den.support import ranks
from den.train.sharding import Shards
from den_kernels import DynamicBatchNorm2d

BUCKET = 8 * 2**20  # bytes that are sent at once; the first ones leave while the backward pass computes the others


class GradientMeans:
    """Gradients of some parameters, each the mean over the processes once the backward pass has ended.

    Parameters are sent in buckets, the last ones first: their gradients are the first to be known.  Every process
    sends the same buckets in the same order, whether a parameter has a gradient there or not, so that none waits for
    another in vain.  A parameter without a gradient keeps none; the processes must agree on which those are, see
    `check`.

    parameters: by name, all of which require gradients; the same in every process.
    shards: the owners of the parameters, which alone get the means; None: all processes do.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], shards: Shards | None = None, bucket: int = BUCKET
    ) -> None:
        self._owner = shards.owner if shards else lambda _: None
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._buckets: list[list[nn.Parameter]] = []
        size = bucket
        for parameter in reversed(self._parameters):
            last = self._buckets[-1][-1] if self._buckets else parameter
            if size >= bucket or self._kind(parameter) != self._kind(last):
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.nbytes
        self._missing: list[int] = []  # gradients that a bucket waits for
        self._sent: list[tuple[Tensor, Any]] = []
        self._watching = False
        self._there: list[bool] = []  # which parameters have got a gradient
        for place, members in enumerate(self._buckets):
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(lambda _, place=place: self._arrived(place))

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Context of the backward pass that completes the gradients; after it they are the means."""
        self._missing, self._sent, self._watching = [len(members) for members in self._buckets], [], True
        try:
            yield
            while len(self._sent) < len(self._buckets):
                self._send()
        finally:
            self._watching = False
        self._there = [parameter.grad is not None for parameter in self._parameters]
        for members, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()  # of a GPU: its later work does
            if self._owner(members[0]) not in (None, ranks.rank()):
                for parameter in members:
                    parameter.grad = None
                continue
            flat /= ranks.count()
            for parameter, mean in zip(members, flat.split([p.numel() for p in members]), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view(parameter.shape))
        self._sent = []

    def check(self) -> None:
        """Raise ValueError in all processes unless the same parameters have gradients in all; waits for no device."""
        there = ranks.gathered(self._there)
        for number, found in enumerate(there):
            if found != there[0]:
                names = [n for n, one, other in zip(self._names, found, there[0], strict=True) if one != other]
                raise ValueError(
                    "train: every process must compute gradients of the same parameters, got another choice in"
                    f" processes 0 and {number}: {', '.join(names[:5])}"
                )

    def _arrived(self, place: int) -> None:
        if self._watching:
            self._missing[place] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

    def _send(self) -> None:
        """Begin to add up the next bucket over the processes."""
        members = self._buckets[len(self._sent)]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in members])
        owner = self._owner(members[0])
        work = dist.all_reduce(flat, async_op=True) if owner is None else dist.reduce(flat, owner, async_op=True)
        self._sent.append((flat, work))

    def _kind(self, parameter: nn.Parameter) -> tuple[object, ...]:
        """Properties that parameters which are sent together have in common."""
        return parameter.dtype, parameter.device, self._owner(parameter)


def share_statistics(model: nn.Module, apart: Container[nn.Module] = ()) -> None:
    """Let all processes share the statistics of the batch norms of `model` while training, but for those `apart`.

    Raises TypeError for a batch norm of another kind, which could not.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.BatchNorm2d:  # of other libraries' networks
                setattr(parent, name, DynamicBatchNorm2d.from_norm(module))
    for name, module in model.named_modules():
        if isinstance(module, DynamicBatchNorm2d | FeatureNorm):
            module.process_group = None if module in apart else "world"
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            kinds = "a DynamicBatchNorm2d or FeatureNorm"
            raise TypeError(f"share_statistics: {name} must be {kinds}, got {type(module).__name__}")
