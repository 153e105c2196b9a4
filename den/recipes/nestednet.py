"""NestedNet (Kim, Ahn, Oh, CVPR 2018): nested widths of one network, each task at the width that it was given."""

from typing import Any

import torch
from torch import Tensor

from den.data import Batch
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.recipes.base import ComparedMethod, answers, task_rows
from den.support.device import sent
from den.train.config import TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective, instance_losses
from den.train.phases import NetworkPhase


class NestedNet(ComparedMethod):
    """Minimises the mean over levels of the loss at that level, all blocks at the same one.

    As the DEN paper has it: several tasks have a level each, by hand (`methods.levels`), and a level learns its tasks.
    One task learns at every level that keeps a channel, all of them in one batch, and is run at its own (the highest
    unless `methods.levels` says otherwise; `evaluate` at the structure [l, l, ...] gives the others).

    Raises:
        ValueError: more tasks than levels that keep a channel; `methods.levels` that do not fit.
    """

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.task_levels = task_levels(model, config)
        self.learnt = self.task_levels if len(self.task_levels) > 1 else usable_levels(model)

    def structures(self, images: Images, task: Tasks) -> Tensor:
        levels = torch.tensor(self.task_levels)[:, None].expand(-1, self.model.num_blocks)
        return task_rows(levels, self.model, images, task)

    def update_cost(self) -> float:
        """Return what all levels cost together for one task, and for several tasks the mean of a level of each."""
        costs = self.model.estimator.level_flops.cpu().double().sum(0) / self.full_flops
        own = costs[list(self.learnt)]
        return (own.sum() if len(self.task_levels) == 1 else own.mean()).item()

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        structures = self.structures(batch.images, batch.tasks).unsqueeze(1)  # [B, S, N]
        if len(self.task_levels) == 1:
            every = sent(torch.tensor(self.learnt), structures.device)
            structures = every[None, :, None].expand(len(batch), -1, self.model.num_blocks)
        samples = structures.shape[1]
        logits = self.estimate(batch, structures)
        seen = Batch(batch.tasks, batch.images, [labels.repeat_interleave(samples) for labels in batch.labels])
        losses = instance_losses(logits, seen.labels).split([len(labels) for labels in seen.labels])
        loss = torch.stack([batch.mean(part, k) for k, part in enumerate(losses)]).mean()
        ratio, accuracy = self.flops_ratio(structures.flatten(0, 1), batch), batch.mean(answers(logits, seen))
        return Objective(loss, {"loss": loss.detach(), "accuracy": accuracy, "flops_ratio": ratio})


def usable_levels(model: DeepElasticNetwork) -> tuple[int, ...]:
    """Levels at which every block has channels."""
    return tuple(level for level in range(model.levels) if model.estimator.level_parameters[:, level].all())


def task_levels(model: DeepElasticNetwork, config: TrainConfig) -> tuple[int, ...]:
    """The level of each task: `methods.levels`, or the highest in the order of the tasks."""
    usable, count, given = usable_levels(model), len(model.tasks), config.methods.levels
    if count > len(usable):
        raise ValueError(
            f"{config.mode}: tasks must be at most {len(usable)}, the levels that keep a channel, got {count}"
            " (every task has a level of its own: raise network.levels)"
        )
    if not given:
        return usable[len(usable) - count :]
    if len(given) != count or len(set(given)) != count or not set(given) <= set(usable):
        raise ValueError(
            f"{config.mode}: methods.levels must be {count} different levels of {list(usable)}, got {list(given)}"
        )
    return given
