"""Heads of DAG networks: from the trunk's output to logits of an image, or to values of each of its pixels."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from den.dag.kinds import KINDS
from den.dag.model_config import DagConfig
from den.nn.ends import ConvNormReLU, FeatureNorm
from den.nn.modules import Modules
from den.nn.tasks import Task

DILATIONS = (6, 12, 18, 24)


class ClassHead(nn.Module):
    """Features [B, C], averaged over the map -> logits [B, classes]: batch norm of the task's own, linear.

    Pooled activations share a mean that is large beside what tells images apart; without the norm a network of ReLUs
    and gates learns very slowly.  While training a batch must hold two images of the task, for the norm.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = FeatureNorm(channels)
        self.linear = nn.Linear(channels, classes)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:  # [B, C] -> [B, classes]
        if self.training and pooled.shape[0] == 1 and not self.norm.shares:
            raise ValueError("ClassHead: while training a batch must hold at least two images of a task, got one")
        return self.linear(self.norm(pooled))

    def flops(self) -> int:
        """Twice the multiply-adds of the linear layer for one image."""
        return 2 * self.linear.weight.numel()


class DenseHead(nn.Module):
    """Maps [B, C, h, w] -> values of every pixel of the images, [B, classes, H, W].

    Atrous spatial pyramid pooling (Chen et al., DeepLab, 2018): four 3x3 convolutions of dilations 6, 12, 18 and 24,
    each with batch norm and ReLU, side by side; a 1x1 convolution; bilinear interpolation to the images' size.
    """

    def __init__(self, channels: int, task: Task, map_size: tuple[int, int]) -> None:
        super().__init__()
        self.map_size, self.image_size = map_size, task.shape[1:]
        self.branches: Modules[ConvNormReLU] = Modules(ConvNormReLU(channels, channels, 3, 1, d, d) for d in DILATIONS)
        self.conv = nn.Conv2d(len(DILATIONS) * channels, task.classes, 1)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, maps: Tensor) -> Tensor:  # [B, C, h, w] -> [B, classes, H, W]
        values = self.conv(torch.cat([branch(maps) for branch in self.branches], 1))
        if not maps.shape[0]:
            return values[:, :, :1, :1].expand(-1, -1, *self.image_size)  # with a gradient, as where there are maps
        return F.interpolate(values, size=self.image_size, mode="bilinear", align_corners=False)

    def flops(self) -> int:
        """Twice the multiply-adds of its convolutions for one image."""
        weights = sum(branch.conv.weight.numel() for branch in self.branches) + self.conv.weight.numel()
        return 2 * weights * self.map_size[0] * self.map_size[1]


def make_head(task: Task, config: DagConfig) -> nn.Module:
    """The head of a task; a dense one reads the maps, the other their means."""
    if (own := KINDS[task.kind].head) is not None:
        return own(task, config)
    if task.dense:
        return DenseHead(config.channels, task, config.map_size())
    return ClassHead(config.channels, task.classes)


def head_flops(head: nn.Module, task: Task, config: DagConfig) -> int:
    """Twice the multiply-adds of a head for one image; of one that does not say, as torch counts them."""
    if isinstance(head, ClassHead | DenseHead):
        return head.flops()
    like = next(head.parameters(), torch.empty(0))
    shape = (1, config.channels, *(config.map_size() if task.dense else ()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(torch.zeros(shape, dtype=like.dtype, device=like.device))
    return counter.get_total_flops()
