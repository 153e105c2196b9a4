"""The selector g(x): a small network that gives each block a probability distribution over levels (paper, eq. 2)."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks import BlockShape
from den.nn.conv_norm import ConvNormReLU
from den.nn.modules import Modules
from den.nn.norms import FeatureNorm
from den.nn.stem import KERNEL, Stem
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den.nn.tasks import Task

BUDGET = 0.04  # of the estimator's block FLOPs, for the default


@dataclass(frozen=True)
class SelectorConfig:
    """Channels of the selector's convolutions; each of them halves the map, the first (a stem per task) the trunk's.

    Raises:
        ValueError: no channels, or a number below 1.
    """

    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or not all(isinstance(c, int) and c >= 1 for c in self.channels):
            raise ValueError(f"SelectorConfig: channels must be whole numbers of at least 1, got {self.channels}")

    def sizes(self, trunk_size: int) -> tuple[int, ...]:
        """Side of each convolution's map: `trunk_size` halved once more each time, rounded up."""
        return tuple(-(-trunk_size // 2 ** (index + 1)) for index in range(len(self.channels)))

    def flops(self, image_channels: int, trunk_size: int) -> int:
        """FLOPs of the convolutions for one image: twice the multiply-adds."""
        sizes = self.sizes(trunk_size)
        total = 2 * KERNEL**2 * image_channels * self.channels[0] * sizes[0] ** 2
        for (before, channels), size in zip(itertools.pairwise(self.channels), sizes[1:], strict=True):
            total += 2 * 9 * before * channels * size**2
        return total


def default_selector(
    tasks: Sequence[Task], shapes: Sequence[BlockShape], trunk_size: int | None = None
) -> SelectorConfig:
    """A selector for an estimator: few and wide convolutions, as wide as its blocks, within 4 % of their FLOPs.

    Starts from (C, 2C, 2C), C being the channels of the first block, and narrows C in steps of 8 until it fits (C = 8
    at the least). WRN-32-4 gets (64, 128, 128): 0.9 % of its FLOPs; the paper's selector has 5 %. `trunk_size` is the
    side of the map that its first convolution halves; None: what the first block reads.
    """
    budget = BUDGET * sum(shape.flops(shape.hidden) for shape in shapes)
    image_channels, trunk_size = max(task.channels for task in tasks), trunk_size or shapes[0].in_size
    width = max(8, shapes[0].channels)
    while width > 8 and SelectorConfig((width, 2 * width, 2 * width)).flops(image_channels, trunk_size) > budget:
        width = max(8, width - 8)
    return SelectorConfig((width, 2 * width, 2 * width))


class Selector(nn.Module):
    """Stem per task, shared stride-2 convolutions, global average pool, norm and head per task -> logits [B, N, L].

    The heads start near zero, so that the first distributions are near uniform. The norm before them takes out what all
    images of a task have in common (pooled activations share a large mean): without it the head's weights learn one
    structure for the whole task long before they learn how images differ, and the selector's variety collapses.
    """

    def __init__(
        self, tasks: Sequence[Task], config: SelectorConfig, num_blocks: int, levels: int, trunk_size: int
    ) -> None:
        super().__init__()
        self.tasks, self.num_blocks, self.levels = tuple(tasks), num_blocks, levels
        self.sizes = config.sizes(trunk_size)
        self.stems: Modules[Stem] = Modules(Stem(task, config.channels[0], trunk_size, self.sizes[0]) for task in tasks)
        self.convs = nn.Sequential(
            *(ConvNormReLU(before, after, 3, 2, 1) for before, after in itertools.pairwise(config.channels))
        )
        self.norms: Modules[FeatureNorm] = Modules(FeatureNorm(config.channels[-1], affine=False) for _ in tasks)
        self.heads: Modules[nn.Linear] = Modules(nn.Linear(config.channels[-1], num_blocks * levels) for _ in tasks)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, images: Images, task: Tasks) -> Tensor:
        """Logits [B, N, L] of the levels of every block, in the order of the images.

        Args:
            images: [B, C, S, S], or a list of one such tensor per task.
            task: one task, a list per task, or tasks per instance: see `den.nn.task_batch.task_batch`.

        Raises:
            ValueError: images or task that do not fit.
        """
        batch = task_batch(images, task, self.tasks, like=self.heads[0].weight)
        return batch.restore(self.run(batch))

    def run(self, batch: TaskBatch) -> Tensor:
        """Logits [B, N, L] of a checked batch, in the batch's own order."""
        x = [self.stems[k](images) for k, images in zip(batch.tasks, batch.images, strict=True)]
        x = self.convs(x[0] if len(x) == 1 else torch.cat(x)).mean((2, 3))
        logits = torch.cat([self._head(k, part) for k, part in zip(batch.tasks, x.split(batch.sizes), strict=True)])
        return logits.view(-1, self.num_blocks, self.levels)

    def _head(self, task: int, pooled: Tensor) -> Tensor:
        """Logits of one task's pooled features [B_k, C]. Fewer than two images have no statistics of their own."""
        norm = self.norms[task]
        if len(pooled) < 2 and norm.training and not norm.shares:
            pooled = F.batch_norm(pooled, norm.running_mean, norm.running_var, eps=norm.eps)
        else:
            pooled = norm(pooled)
        return self.heads[task](pooled)

    def flops(self, task: int) -> int:
        """FLOPs of convolutions and head for one image of the task at position `task`: twice the multiply-adds."""
        layers = zip(cast(Iterable[ConvNormReLU], self.convs), self.sizes[1:], strict=True)
        convs = sum(2 * layer.conv.weight.numel() * size**2 for layer, size in layers)
        return self.stems[task].flops() + convs + 2 * self.heads[task].weight.numel()
