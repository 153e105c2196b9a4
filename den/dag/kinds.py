"""The kinds of tasks: how each is learned and measured.  `register_kind` adds one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from den.dag.dense_losses import balanced_loss, depth_loss, normals_loss, segmentation_loss
from den.dag.dense_metrics import (
    Collected,
    DepthMetrics,
    EdgeMetrics,
    NormalsMetrics,
    SaliencyMetrics,
    SegmentationMetrics,
)
from den.dag.model_config import DagConfig
from den.nn.tasks import TASK_KINDS, Task, TaskKind


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
    """Loss, metrics and outputs of the tasks of one kind.

    Attributes:
        loss: of outputs and targets of a batch, a mean over its images: a tensor [].
        metrics: makes what collects the results of a task.
        falling: the metrics of which less is better.
        dense: True where every pixel has a target; the head then reads maps [B, C, h, w] and gives [B, values, H, W].
        values: how many values such a task predicts; None: as many as the task says.
        head: makes the head of a task in a network; None: batch norm and a linear layer [B, C] -> [B, values], of dense
            tasks atrous spatial pyramid pooling.
        counts: True where the loss is a mean over other things than images, and takes a third argument, `Count`.
    """

    loss: Callable[..., Tensor]
    metrics: Callable[[Task], Metrics]
    falling: tuple[str, ...] = ()
    dense: bool = False
    values: int | None = None
    head: Callable[[Task, DagConfig], nn.Module] | None = None
    counts: bool = False


KINDS: dict[str, Kind] = {}


def register_kind(name: str, kind: Kind) -> None:
    """Let tasks be of the kind `name` from here on; the same may be registered again.

    Raises ValueError for a name that stands for another kind.
    """
    if KINDS.get(name, kind) != kind:
        raise ValueError(f"register_kind: name must not be one of {', '.join(KINDS)}, got {name!r}")
    KINDS[name], TASK_KINDS[name] = kind, TaskKind(kind.dense, kind.values)


def _of_images(loss: Callable[..., Tensor], metrics: Callable[[Task], Metrics], *falling: str,
               values: int | None = None) -> Kind:  # fmt: skip
    return Kind(loss, metrics, falling, dense=True, values=values, counts=True)


register_kind("classification", Kind(F.cross_entropy, lambda task: ClassMetrics()))
register_kind("segmentation", _of_images(segmentation_loss, lambda task: SegmentationMetrics(task.classes)))
register_kind("depth", _of_images(depth_loss, lambda task: DepthMetrics(), "abs_error", "rel_error", values=1))
register_kind("normals", _of_images(normals_loss, lambda task: NormalsMetrics(), "mean_angle", "median_angle",
                                    values=3))  # fmt: skip
register_kind("edges", _of_images(balanced_loss, lambda task: EdgeMetrics(), values=1))
register_kind("saliency", _of_images(balanced_loss, lambda task: SaliencyMetrics(), values=1))


def relative_gains(kind: str, results: dict[str, float], single: dict[str, float]) -> dict[str, float]:
    """``±(ours - single) / single`` of each metric that both know, above 0 where ours is better.

    The mean of a task's is its Delta of the AdaShare protocol (Sun et al., NeurIPS 2020).
    """
    return {
        name: (-1 if name in KINDS[kind].falling else 1) * (results[name] - value) / value
        for name, value in single.items()
        if name in results and value
    }
