"""The loss of a batch of several tasks."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from den.dag.kinds import KINDS
from den.dag.network import DagNetwork
from den.dag.peers import PeerNetwork
from den.data import Batch
from den.nn.task_batch import find_task
from den.nn.tasks import Task


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
    losses = torch.stack([_loss(batch, k, tasks[k], output) for k, output in enumerate(outputs)])
    told = losses.detach()
    measured = {"loss": told.sum().double() / len(told)}
    plain = [k for k, task in enumerate(tasks) if task.kind == "classification"]
    if plain:
        hits = torch.cat([outputs[k].argmax(1) == batch.labels[k] for k in plain]).float()
        measured["accuracy"] = batch.mean(hits, *plain)
    others = {f"loss_{t.name}": loss for t, loss in zip(tasks, told, strict=True) if t.kind != "classification"}
    return losses, {**measured, **others}


def _loss(batch: Batch, k: int, task: Task, output: Tensor) -> Tensor:
    """The mean loss [] of task k, of its outputs [B_k, ...]; of a share of a batch see `Batch.mean`."""
    kind, target = KINDS[task.kind], batch.labels[k]
    if batch.share is None:
        return kind.loss(output, target)
    if kind.counts:
        return kind.loss(output, target, partial(batch.known, k))
    if not len(target):
        return output.sum() * 0  # no loss, and gradients as in the other processes
    return kind.loss(output, target) * (len(target) * batch.share.parts / batch.share.counts[k])
