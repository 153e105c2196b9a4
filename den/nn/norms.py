"""Batch norms that several processes can share: sums and counts then run over the batches of all of them."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from den_kernels import DynamicBatchNorm2d, dynamic_batch_norm


class FeatureNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of features [B, C].  One image or none leave the running statistics as they are.

    One image alone has no statistics of its own: while training, too, it is normed with the running ones.

    Attributes:
        process_group: as of `DynamicBatchNorm2d`: "world" where all processes share their statistics while training.
    """

    process_group: Literal["world"] | None = None

    @property
    def shares(self) -> bool:
        """True where the next call takes its statistics from several processes."""
        return self.process_group is not None and self.training and dist.is_initialized() and dist.get_world_size() > 1

    def forward(self, x: Tensor) -> Tensor:  # [B, C]
        if self.process_group is None or not self.shares:
            if self.training and len(x) == 1:
                return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return super().forward(x) if x.shape[0] else x
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        everything = torch.ones(len(x), dtype=torch.int32, device=x.device)
        y = dynamic_batch_norm(
            x[:, :, None, None], everything, self.weight, self.bias, self.running_mean, self.running_var,
            groups=(self.num_features,), training=True, momentum=self.momentum or 0.0, eps=self.eps,
            process_group=dist.group.WORLD,
        )  # fmt: skip
        return y[:, :, 0, 0]


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
