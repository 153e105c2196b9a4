"""The loss of a batch of several tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from den.dag.kinds import KINDS
from den.dag.network import DagNetwork
from den.dag.peers import PeerNetwork
from den.data import Batch
from den.nn.tasks import find_task


def task_loss(
    model: DagNetwork | PeerNetwork, batch: Batch, weights: Sequence[float] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tasks of their mean losses, weighted (empty: by 1), and what to report of it, see `batch_losses`."""
    losses, measured = batch_losses(model, batch)
    if weights:
        losses = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)])
    return losses.sum(), measured


def batch_losses(model: DagNetwork | PeerNetwork, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean losses of the tasks [K], in the order of the batch, and what to report of them: their mean, the accuracy
    over the images of classification tasks, and the losses of the others, on the model's device."""
    outputs = model(batch.images, batch.tasks)
    tasks = [model.tasks[find_task(name, model.tasks)] for name in batch.tasks]
    parts = list(zip(tasks, outputs, batch.labels, strict=True))
    losses = torch.stack([KINDS[task.kind].loss(output, target) for task, output, target in parts])
    told = losses.detach()
    measured = {"loss": told.sum().double() / len(told)}
    hits = [output.argmax(1) == target for task, output, target in parts if task.kind == "classification"]
    if hits:
        measured["accuracy"] = torch.cat(hits).float().mean()
    others = {f"loss_{t.name}": loss for t, loss in zip(tasks, told, strict=True) if t.kind != "classification"}
    return losses, {**measured, **others}
