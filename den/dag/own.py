"""Tasks of a user's own, as a dictionary from names to what they predict and how that is learned and measured."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from den.dag.kinds import KINDS, Metrics, register_kind
from den.dag.model_config import DagConfig
from den.nn.tasks import Task


@dataclass(frozen=True)
class OwnTask:
    """Outputs of a task, and all in which it differs from its kind.

    Attributes:
        values: number of classes, or of values predicted.
        kind: one of the kinds that there are, which the rest changes.
        loss: of outputs and targets of a batch, a mean.
        metrics: makes what collects the results of a task, see `den.dag.Metrics`.
        falling: the metrics of which less is better.
        head: makes the head of the task, a module from features [B, C] (dense: maps [B, C, h, w]) to its outputs.
        weight: of its loss.
    """

    values: int
    kind: str = "classification"
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    metrics: Callable[[Task], Metrics] | None = None
    falling: tuple[str, ...] | None = None
    head: Callable[[Task, DagConfig], nn.Module] | None = None
    weight: float = 1.0


def own_tasks(tasks: Mapping[str, OwnTask], shapes: Mapping[str, tuple[int, int, int]]) -> tuple[Task, ...]:
    """The tasks of a dictionary; `shapes`: channels, height and width of their images.

    A task that changes its kind gets one of its own, named after both: ``"classification of parity"``.

    Raises ValueError for what `Task` refuses, and a name that stands for another such task in this process.
    """
    made = []
    for name, own in tasks.items():
        kind, (channels, height, width) = own.kind, shapes[name]
        if kind not in KINDS:
            raise ValueError(f"fit: kind of {name!r} must be one of {', '.join(KINDS)}, got {kind!r}")
        given = {part: getattr(own, part) for part in ("loss", "metrics", "falling", "head")}
        if changes := {part: value for part, value in given.items() if value is not None}:
            changed = dataclasses.replace(KINDS[kind], **changes)
            kind = f"{kind} of {name}"
            register_kind(kind, changed)
        made.append(Task(name, own.values, height, channels, kind, width))
    return tuple(made)
