"""The loss of a batch of several tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from den.dag.kinds import KINDS
from den.dag.network import DagNetwork
from den.dag.peers import PeerNetwork
from den.data import Batch
from den.tasks import find_task


def task_loss(
    model: DagNetwork | PeerNetwork, batch: Batch, weights: Sequence[float] = ()
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Sum over tasks of their mean losses, weighted (empty: by 1), and what to report of it: the mean of the losses,
    the accuracy over the images of classification tasks, and the losses of dense tasks."""
    outputs = model(batch.images, batch.tasks)
    tasks = [model.tasks[find_task(name, model.tasks)] for name in batch.tasks]
    parts = list(zip(tasks, outputs, batch.labels, strict=True))
    losses = torch.stack([KINDS[task.kind].loss(output, target) for task, output, target in parts])
    measured: dict[str, Tensor | float] = {"loss": losses.sum().item() / len(losses)}
    hits = [output.argmax(1) == target for task, output, target in parts if not task.dense]
    if hits:
        measured["accuracy"] = torch.cat(hits).float().mean().item()
    dense = {task.name: value for task, value in zip(tasks, losses.tolist(), strict=True) if task.dense}
    total = (losses * losses.new_tensor(weights)).sum() if weights else losses.sum()
    return total, {**measured, **{f"loss_{name}": value for name, value in dense.items()}}
