"""BlockDrop (Wu et al., CVPR 2018): a policy network keeps or drops every residual block, for every image."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from den.data import Batch
from den.evaluate.accuracy import Choice
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.recipes.base import ComparedMethod, answers, skippable
from den.support.device import sent
from den.support.randomness import Draws, uniform
from den.train.config import PhaseConfig, TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective, instance_losses
from den.train.phases import NetworkPhase


class BlockDrop(ComparedMethod):
    """Three phases: the network alone (`estimator.first`), the policy alone (`selector.phase`), both (`finish`).

    The policy network is the selector; it keeps a block with probability s = sigmoid(logit of the highest level - logit
    of level 0).  The other levels are not used.

    Raises:
        ValueError: a backbone whose blocks cannot be left out.
    """

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        skippable(model, "blockdrop")

    def structures(self, images: Images, task: Tasks) -> Tensor:
        """The full level where s >= 1/2, else level 0."""
        with torch.no_grad():
            return self._levels(self.logits(images, task) >= 0)

    def logits(self, images: Images, task: Tasks) -> Tensor:
        """Logits [B, N] of s."""
        logits = self.model.selector_logits(images, task)
        return logits[..., -1] - logits[..., 0]

    def phases(self) -> tuple[NetworkPhase, ...]:
        selector, joint = self.config.selector, self._joint()
        phases = (
            NetworkPhase("estimator", 1, self.first(spent=joint.steps)),
            NetworkPhase("selector", 1, selector.phase),
            NetworkPhase("both", 2, joint, selector_rate=selector.phase.rate * selector.decay),
        )
        return tuple(phase for phase in phases if phase.settings.steps > 0)

    def _joint(self) -> PhaseConfig:
        """Settings of the phase that trains both: `finish`; without one, with matched updates, all of `later`."""
        estimator = self.config.estimator
        if estimator.finish.steps or self.config.methods.updates == "first":
            return estimator.finish
        later = estimator.later
        steps = (self.config.stages - 1) * later.steps
        return replace(later, steps=steps, rate=later.rate * estimator.decay, schedule="step")

    def choice(self, phase: NetworkPhase) -> Choice:
        return "full" if phase.network == "estimator" else self.structures

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        """The policy's loss, with the cross-entropy at the drawn structures where the network trains too."""
        if phase.network == "estimator":
            return self.estimator_loss(batch, None)
        settings, joint = self.config.methods, phase.network == "both"
        logits = self.logits(batch.images, batch.tasks).float()
        free = free_blocks(logits.shape[1], 1.0 if joint else engine.progress, settings.drop_curriculum)
        drawn, greedy, chance = draw(logits, free, settings.drop_bound, batch.draws(engine.generator))
        with torch.set_grad_enabled(joint):
            structures = self._levels(torch.stack([drawn, greedy], 1))  # [B, 2, N]
            answered = self.estimate(batch, structures)
        seen = Batch(batch.tasks, batch.images, [labels.repeat_interleave(2) for labels in batch.labels])
        right = answers(answered, seen).view(-1, 2)
        gamma = settings.drop_penalty_joint if joint else settings.drop_penalty
        gains = rewards(torch.stack([drawn, greedy], 1), right, gamma)
        loss = policy_loss(chance, drawn, gains[:, 0] - gains[:, 1], free, batch.mean)
        measured = {"loss": loss.detach(), "reward": batch.mean(gains[:, 0]), "accuracy": batch.mean(right[:, 0])}
        if joint:
            loss = loss + batch.mean(instance_losses(answered, seen.labels).view(-1, 2)[:, 0])
            measured["loss"] = loss.detach()
        return Objective(loss, {**measured, "flops_ratio": self.flops_ratio(structures[:, 0], batch)})

    def _levels(self, keeps: Tensor) -> Tensor:  # 0 or 1 -> levels, [..., N]
        return keeps.long() * (self.model.levels - 1)


def free_blocks(blocks: int, progress: float, curriculum: float) -> int:
    """Number of the last blocks that may be dropped; the others are kept.

    >>> [free_blocks(10, progress, 0.5) for progress in (0, 0.1, 0.25, 0.5, 1)]
    [1, 3, 6, 10, 10]
    """
    return blocks if progress >= curriculum else 1 + math.floor((blocks - 1) * progress / curriculum + 0.5)


def draw(logits: Tensor, free: int, bound: float, generator: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Structures drawn from s' = bound s + (1 - bound) (1 - s) and the likeliest, bool [B, N] each, and s' [B, N].

    All but the last `free` blocks are kept in both.
    """
    chance = logits.sigmoid()
    chance = bound * chance + (1 - bound) * (1 - chance)
    drawn = sent(uniform(logits.shape, generator), logits.device)
    fixed = torch.arange(logits.shape[1], device=logits.device) < logits.shape[1] - free
    return (drawn < chance) | fixed, (logits >= 0) | fixed, chance


def rewards(keeps: Tensor, right: Tensor, gamma: float) -> Tensor:
    """1 - (share of blocks kept)^2 where the answer is right, else -gamma: keeps [..., N], right [...] -> [...]."""
    return torch.where(right > 0, 1 - keeps.float().mean(-1).square(), torch.full_like(right, -gamma))


def policy_loss(
    chance: Tensor, keeps: Tensor, advantage: Tensor, free: int, mean: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    """Minus advantage [B] times log P(keeps [B, N]) over the free blocks, `mean` over B (self-critical baseline)."""
    likelihood = torch.where(keeps, chance, 1 - chance).clamp_min(1e-6).log()[:, chance.shape[1] - free :].sum(1)
    return -mean(advantage.detach() * likelihood)
