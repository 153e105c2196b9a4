"""Distillation while the estimator trains: its full structure teaches the smaller ones, or a trained network all.

Ours, not the paper's.

The former is that of slimmable networks (Yu and Huang, Universally Slimmable Networks, ICCV 2019: the widest width
learns the labels, the others from its answers, all in one update), the latter that of Once-for-All networks (Cai et
al., ICLR 2020: from a network that was trained before), both with temperatures as Hinton et al. (2015) have them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from den.data import Batch
from den.nn.model import DeepElasticNetwork
from den.recipes.base import Method, answers
from den.support.device import sent
from den.support.randomness import Draws, uniform
from den.train.config import EstimatorTraining
from den.train.objective import Objective, instance_losses


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

    The former is (1 - w) times the cross-entropy of the label plus w times the `softened_divergence` from the full
    structure, which gets no gradient of it; the latter the cross-entropy.

    Args:
        logits: [B + n, classes], those of the full structures last.
        labels: int64 [B].
        taught: int64 [n], positions of the taught images.
    """
    own, full = logits.float().split([len(labels), len(taught)])
    losses = F.cross_entropy(own, labels, reduction="none")
    learnt = (1 - weight) * losses[taught] + weight * softened_divergence(own[taught], full.detach(), temperature)
    learnt = learnt + F.cross_entropy(full, labels[taught], reduction="none")
    return losses.index_copy(0, taught, learnt)


def softened_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """t² times the divergence (Kullback and Leibler) of answers from a teacher's, both softened by t: [B].

    logits, teacher: [B, classes].
    """
    target = (teacher.float() / temperature).log_softmax(1)
    answer = (logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(answer, target, reduction="none", log_target=True).sum(1)


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


def taught_loss(method: Method, teacher: DeepElasticNetwork, batch: Batch, structures: Tensor | None) -> Objective:
    """Mean loss of the images at structures [B, N] (None: the full ones), taught by another network's full structure.

    Of each image (1 - w) times the cross-entropy of the label plus w times the `softened_divergence` from the teacher.
    """
    settings: EstimatorTraining = method.config.estimator
    with torch.no_grad():
        taught = teacher.estimator.part_logits(batch.for_network(teacher.positions), None)
    logits = method.estimate(batch, structures)
    weight, temperature = settings.distill, settings.distill_temperature
    divergence = [softened_divergence(*each, temperature) for each in zip(logits, taught, strict=True)]
    loss = batch.mean((1 - weight) * instance_losses(logits, batch.labels) + weight * torch.cat(divergence))
    accuracy, ratio = batch.mean(answers(logits, batch)), method.flops_ratio(structures, batch)
    return Objective(loss, {"loss": loss.detach(), "accuracy": accuracy, "flops_ratio": ratio})
