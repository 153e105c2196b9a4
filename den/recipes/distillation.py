"""Distillation while the estimator trains: the full structure teaches the smaller ones.  Ours, not the paper's.

As in slimmable networks (Yu and Huang, Universally Slimmable Networks, ICCV 2019: the widest width learns the labels,
the others from its answers, all in one update) and in Once-for-All networks (Cai et al., ICLR 2020), with temperatures
as Hinton et al. (2015) have them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from den.data import Batch
from den.recipes.base import Method, answers
from den.support.device import Draws, sent, uniform
from den.train.config import EstimatorTraining
from den.train.objective import Objective


def taught_images(batch: Batch, share: float, draws: Draws) -> list[Tensor]:
    """Which images of each part also run at the full structure: int64 positions [n_k], on the CPU."""
    taught = uniform((batch.count, 1), draws)[:, 0] < share
    return [part.nonzero()[:, 0] for part in taught.split([len(images) for _, images, _ in batch.parts])]


def with_teachers(batch: Batch, structures: Tensor, taught: list[Tensor], highest: int) -> tuple[Batch, Tensor]:
    """The batch with its taught images once more, behind the others of their part, and the structures of both.

    structures: int64 [B, N]; those of the repeated images are full, of level `highest` in every block.
    """
    images, rows, full = [], [], torch.full_like(structures[:1], highest)
    for (_, part, _), index, own in zip(batch.parts, taught, _of_parts(batch, structures), strict=True):
        images.append(torch.cat([part, part[sent(index, part.device)]]))
        rows += [own, full.expand(len(index), -1)]
    if batch.joint:  # the labels of the same images, which stay the same
        images, taught = images * len(batch.tasks), taught * len(batch.tasks)
    labels = [
        torch.cat([each, each[sent(index, each.device)]]) for each, index in zip(batch.labels, taught, strict=True)
    ]
    return Batch(batch.tasks, images, labels), torch.cat(rows)


def _of_parts(batch: Batch, structures: Tensor) -> tuple[Tensor, ...]:
    return structures.split([len(images) for _, images, _ in batch.parts])


def distilled_losses(logits: Tensor, labels: Tensor, taught: Tensor, weight: float, temperature: float) -> Tensor:
    """Loss of every image of a part, of a taught one with that of its full structure: [B].

    The former is (1 - w) times the cross-entropy of the label plus w t² times the divergence (Kullback and Leibler) of
    the softened answer from that of the full structure, which gets no gradient of it; the latter the cross-entropy.

    Args:
        logits: [B + n, classes], those of the full structures last.
        labels: int64 [B].
        taught: int64 [n], positions of the taught images.
    """
    own, full = logits.float().split([len(labels), len(taught)])
    losses = F.cross_entropy(own, labels, reduction="none")
    target = (full.detach() / temperature).log_softmax(1)
    answer = (own[taught] / temperature).log_softmax(1)
    divergence = F.kl_div(answer, target, reduction="none", log_target=True).sum(1)
    learnt = (1 - weight) * losses[taught] + weight * temperature**2 * divergence
    learnt = learnt + F.cross_entropy(full, labels[taught], reduction="none")
    return losses.index_copy(0, taught, learnt)


def distilled_loss(method: Method, batch: Batch, structures: Tensor, draws: Draws) -> Objective:
    """Mean loss over all that runs: the images at structures [B, N], and the taught ones at the full structure too.

    Accuracy and FLOPs are those of the structures.
    """
    settings: EstimatorTraining = method.config.estimator
    taught = taught_images(batch, settings.distill_share, draws)
    more, rows = with_teachers(batch, structures, taught, method.model.levels - 1)
    if batch.joint:
        taught = taught * len(batch.tasks)
    logits = method.estimate(more, rows)
    weight, temperature = settings.distill, settings.distill_temperature
    losses = [
        distilled_losses(each, labels, sent(index, labels.device), weight, temperature)
        for each, labels, index in zip(logits, batch.labels, taught, strict=True)
    ]
    loss = batch.mean(torch.cat(losses)) / (1 + settings.distill_share)
    own = [each[: len(labels)] for each, labels in zip(logits, batch.labels, strict=True)]
    accuracy, ratio = batch.mean(answers(own, batch)), method.flops_ratio(structures, batch)
    return Objective(loss, {"loss": loss.detach(), "accuracy": accuracy, "flops_ratio": ratio})
