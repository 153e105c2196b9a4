"""The classification head of a task."""

from __future__ import annotations

from torch import Tensor, nn


class ClassHead(nn.Module):
    """Features [B, C], averaged over the map -> logits [B, classes]: batch norm of the task's own, linear.

    Pooled activations share a mean that is large beside what tells images apart; without the norm a network of ReLUs
    and gates learns very slowly.  While training a batch must hold two images of the task, for the norm.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, classes)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        if self.training and len(pooled) == 1:
            raise ValueError("ClassHead: while training a batch must hold at least two images of a task, got one")
        return self.linear(self.norm(pooled) if len(pooled) else pooled)

    def flops(self) -> int:
        """Twice the multiply-adds of the linear layer for one image."""
        return 2 * self.linear.weight.numel()
