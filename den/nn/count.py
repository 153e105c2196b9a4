"""Counts: parameters of a network and FLOPs of an image."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from den.nn.ends import linear_flops
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import TaskName, find_task


@dataclass(frozen=True)
class ParameterCounts:
    """Learned numbers of a network, by place.

    Attributes:
        blocks: weights of the convolutions and fully connected layers of the estimator's blocks, without batch norms
            and biases; this is what the paper reports (WRN-32-4: 7,345,152; ResNet-42: 29,786,112).
        norms: weights and biases of the batch norms of the blocks and after them, and biases of layers in blocks.
        stems: convolutions and batch norms of the estimator's stems, all tasks.
        heads: weights and biases of the estimator's heads, all tasks, and of the fully connected layers before them
            that are no block.
        selector: the whole selector, all tasks.
    """

    blocks: int
    norms: int
    stems: int
    heads: int
    selector: int

    @property
    def estimator(self) -> int:
        """Parameters of the estimator: all but the selector's."""
        return self.blocks + self.norms + self.stems + self.heads

    @property
    def total(self) -> int:
        """Parameters of the whole network."""
        return self.estimator + self.selector


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs (twice the multiply-adds) of one image of a task at the full structure, by place.

    `head` counts the fully connected layers before the head, too, where they are no block. The Deep Elastic Networks
    paper counts in this way for WRN-32-4 (2.13G) and ResNet-42 (2.91G), but multiply-adds once for SimpleConvNet: its
    27.4M at 84 x 84 are half of our blocks and head.
    """

    stem: int
    blocks: int
    head: int
    selector: int


def count_parameters(model: DeepElasticNetwork) -> ParameterCounts:
    """Learned numbers of `model`, by place; their `total` is all of them."""
    estimator = model.estimator
    blocks = sum(conv.weight.numel() for block in cast(Iterable[Any], estimator.blocks) for conv, _ in block.layers())
    return ParameterCounts(
        blocks=blocks,
        norms=_numbers(estimator.blocks) - blocks + (0 if estimator.norm is None else _numbers(estimator.norm)),
        stems=_numbers(estimator.stems),
        heads=_numbers(estimator.heads) + _numbers(estimator.shared),
        selector=_numbers(model.selector),
    )


def count_flops(model: DeepElasticNetwork, levels: Tensor) -> Tensor:
    """FLOPs of each image's structure: twice the multiply-adds of the blocks' convolutions and fully connected layers.

    Args:
        levels: integer [B, N] in 0..L-1.

    Returns:
        float64 [B] on the model's device (whole numbers, exact).

    Raises:
        ValueError: levels of another shape or dtype, or, on a CPU, out of range.
    """
    table = model.estimator.level_flops  # [N, L]
    if levels.dim() != 2 or levels.shape[1] != len(table) or levels.is_floating_point() or levels.dtype == torch.bool:
        raise ValueError(
            f"count_flops: levels must be integer [B, N] with N = {len(table)}, got {levels.dtype} {list(levels.shape)}"
        )
    if levels.is_cpu and levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < table.shape[1]:
        raise ValueError(
            f"count_flops: levels must be in 0..{table.shape[1] - 1}, got {int(levels.min())}..{int(levels.max())}"
        )
    return table.gather(1, levels.to(table.device, torch.int64).t()).sum(0).double()


def image_flops(model: DeepElasticNetwork, task: TaskName) -> ImageFlops:
    """FLOPs of one image of `task` at the full structure, with what the structure does not change."""
    position = find_task(task, model.tasks)
    estimator = model.estimator
    return ImageFlops(
        stem=estimator.stem_of(position).flops(),
        blocks=sum(shape.flops(shape.hidden) for shape in model.config.shapes),
        head=linear_flops([*estimator.shared, estimator.heads[position]]),
        selector=model.selector.flops(position),
    )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
