"""The kinds of tasks: how each is learned and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from den.dag.dense_losses import balanced_loss, depth_loss, normals_loss, segmentation_loss
from den.dag.dense_metrics import (
    Collected,
    DepthMetrics,
    EdgeMetrics,
    NormalsMetrics,
    SaliencyMetrics,
    SegmentationMetrics,
)
from den.nn.tasks import Task


class Metrics(Protocol):
    """Collects predictions of a set, in batches, and says how good they are."""

    @property
    def count(self) -> int:
        """Targets so far."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch; shapes as the task's loss has them, such as [B, K] and int64 [B] of a classification."""

    def take_in(self, other: Any) -> None:
        """Add what another of the same class has collected."""

    def results(self) -> dict[str, float]: ...


class ClassMetrics(Collected):
    """`accuracy`: share of images whose largest logit is that of their label."""

    def __init__(self) -> None:
        self.count, self._right = 0, 0

    def add(self, logits: Tensor, labels: Tensor) -> None:  # [B, K], int64 [B]
        self._right += int((logits.argmax(1) == labels).sum())
        self.count += len(labels)

    def results(self) -> dict[str, float]:
        return {"accuracy": self._right / self.count}


@dataclass(frozen=True)
class Kind:
    """Loss and metrics of the tasks of one kind.

    Attributes:
        loss: of outputs and targets of a batch, a mean over its images.
        metrics: makes what collects the results of a task.
        falling: the metrics of which less is better.
        counts: True where the loss is a mean over other things than images, and takes a third argument, `Count`.
    """

    loss: Callable[..., Tensor]
    metrics: Callable[[Task], Metrics]
    falling: tuple[str, ...] = ()
    counts: bool = False


KINDS = {
    "classification": Kind(F.cross_entropy, lambda task: ClassMetrics()),
    "segmentation": Kind(segmentation_loss, lambda task: SegmentationMetrics(task.classes), counts=True),
    "depth": Kind(depth_loss, lambda task: DepthMetrics(), ("abs_error", "rel_error"), True),
    "normals": Kind(normals_loss, lambda task: NormalsMetrics(), ("mean_angle", "median_angle"), True),
    "edges": Kind(balanced_loss, lambda task: EdgeMetrics(), counts=True),
    "saliency": Kind(balanced_loss, lambda task: SaliencyMetrics(), counts=True),
}


def relative_gains(kind: str, results: dict[str, float], single: dict[str, float]) -> dict[str, float]:
    """``±(ours - single) / single`` of each metric that both know, above 0 where ours is better.

    The mean of a task's is its Delta of the AdaShare protocol (Sun et al., NeurIPS 2020).
    """
    return {
        name: (-1 if name in KINDS[kind].falling else 1) * (results[name] - value) / value
        for name, value in single.items()
        if name in results and value
    }
