"""AdaShare (Sun, Panda, Feris, Saenko, NeurIPS 2020): for every task and block a gate that is learnt, then drawn."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.data import Batch, ImageSet, MixedTaskBatches
from den.data.images import split_by_image
from den.evaluate.accuracy import Choice
from den.nn.estimator import Estimator
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.recipes.base import ComparedMethod, answers, skippable, task_rows
from den.support.device import sent
from den.train.config import PhaseConfig, TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective, instance_losses
from den.train.phases import Network, NetworkPhase, schedule_factor


class GateState(nn.Module):
    """State of AdaShare beside the network: learned logits and drawn gates."""

    logits: nn.Parameter  # [K, N, 2], of skipping and keeping
    keeps: Tensor  # bool [K, N], what was drawn


class AdaShare(ComparedMethod):
    """Search in rounds, then training from the initial weights.

    A round trains the weights on one half of the training images and the gates on the other, both with gates drawn by
    Gumbel-softmax at the temperature of the round.  All rounds together have the steps of `selector.phase` for either.
    Then one structure is drawn for each task and the weights start anew, for `estimator.first`, on all images.

    Raises:
        ValueError: a backbone whose blocks cannot be left out; more rounds than steps.
    """

    state: GateState
    state_kind = GateState

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        skippable(model, "adashare")
        rounds, steps = config.methods.share_rounds, config.selector.phase.steps
        if rounds > steps:
            raise ValueError(f"adashare: methods.share_rounds must be at most {steps} (selector.phase), got {rounds}")
        shape, device = (len(model.tasks), model.num_blocks), model.estimator.level_flops.device
        self.state.logits = nn.Parameter(torch.zeros(*shape, 2, device=device))
        self.state.register_buffer("keeps", torch.ones(shape, dtype=torch.bool, device=device))
        self.initial = {name: tensor.clone() for name, tensor in model.estimator.state_dict().items()}

    def structures(self, images: Images, task: Tasks) -> Tensor:
        return task_rows(self.state.keeps.long() * (self.model.levels - 1), self.model, images, task)

    def phases(self) -> tuple[NetworkPhase, ...]:
        """Rounds are stages 1, 2, ...; their rates follow the schedules across the rounds."""
        rounds, phases = self.config.methods.share_rounds, []
        first, search = self.config.estimator.first, self.config.selector.phase
        for i in range(rounds):
            steps = search.steps * (i + 1) // rounds - search.steps * i // rounds
            parts: tuple[tuple[Network, PhaseConfig], ...] = (("estimator", first), ("selector", search))
            for network, settings in parts:
                flat = dataclasses.replace(settings, steps=steps, schedule="constant", until="steps")
                factor = schedule_factor(settings.schedule, i / rounds)
                phases.append(NetworkPhase(network, i + 1, flat, factor, stream=network))
        return (*phases, NetworkPhase("estimator", rounds + 1, self.first(spent=search.steps)))

    def streams(self, sets: list[ImageSet]) -> dict[str, MixedTaskBatches]:
        """All images, and the halves of every set that the estimator and the selector (the gates) learn from."""
        data, seed = self.config.data, self.config.seed
        halves = split_by_image(sets, 0.5, seed)
        parts = {"all": sets}
        for i, name in enumerate(("estimator", "selector")):
            parts[name] = [s.subset(half[i]) for s, half in zip(sets, halves, strict=True)]
        shares = data.shares or None
        return {name: MixedTaskBatches(part, data.batch_size, shares, seed) for name, part in parts.items()}

    def enter(self, engine: Engine[Any], phase: NetworkPhase) -> None:
        super().enter(engine, phase)
        if phase.stage > self.config.methods.share_rounds and engine.position.step == 0:
            self._start_anew(engine)

    def choice(self, phase: NetworkPhase) -> Choice:
        """The likelier of keeping and skipping each block while gates are searched for, afterwards what they chose."""
        return self._likeliest if phase.stage <= self.config.methods.share_rounds else self.structures

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        settings, rounds = self.config.methods, self.config.methods.share_rounds
        if phase.stage > rounds:
            return self.estimator_loss(batch, self.structures(batch.images, batch.tasks))
        tau = settings.share_temperature * settings.share_cooling ** (phase.stage - 1)
        logits = self.state.logits if phase.network == "selector" else self.state.logits.detach()
        gates = gumbel_softmax(logits, tau, engine.generator)[..., 1]  # [K, N]
        with gated(self.model.estimator, task_rows(gates, self.model, batch.images, batch.tasks)):
            answered = self.estimate(batch, None)
        loss = batch.mean(instance_losses(answered, batch.labels))
        accuracy, kept = batch.mean(answers(answered, batch)), logits.detach().softmax(-1)[..., 1].mean()
        measured = {"accuracy": accuracy, "kept": kept}
        if phase.network == "selector":
            keep, blocks = keep_logits(logits), logits.shape[1]
            loss = loss + settings.share_sparsity * sparsity_loss(keep)
            weights = 1 - torch.arange(blocks, device=keep.device) / blocks
            loss = loss + settings.share_sharing * sharing_loss(keep, weights)
        return Objective(loss, {"loss": loss.detach(), **measured})

    def _likeliest(self, images: Images, task: Tasks) -> Tensor:
        keeps = self.state.logits[..., 1] >= self.state.logits[..., 0]
        return task_rows(keeps.long() * (self.model.levels - 1), self.model, images, task)

    def _start_anew(self, engine: Engine[Any]) -> None:
        """Draw every task's structure; bring back the initial weights, without what the optimiser remembers."""
        chance = self.state.logits.detach().softmax(-1)[..., 1].cpu()
        drawn = torch.rand(chance.shape, generator=engine.generator) < chance
        self.state.keeps.copy_(drawn)
        self.model.estimator.load_state_dict(self.initial)
        engine.optimisers["estimator"].state.clear()


@contextlib.contextmanager
def gated(estimator: Estimator, gates: Tensor) -> Iterator[None]:
    """Context in which blocks give shortcut(x) + gate * residual(x); gates: [B, N], in the order of the images."""

    def hook(i: int) -> Callable[..., Tensor]:
        def gate(block: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:  # [B, C, H, W], [B, C', H', W']
            return torch.lerp(
                block.shortcut(given[0]).to(output.dtype), output, gates[:, i, None, None, None].to(output.dtype)
            )

        return gate

    hooks = [block.register_forward_hook(hook(i)) for i, block in enumerate(estimator.blocks)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """softmax((logits + G) / temperature), G standard Gumbel: [..., 2]."""
    uniform = torch.rand(logits.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - sent((-uniform.log()).log(), logits.device)) / temperature).softmax(-1)


def keep_logits(logits: Tensor) -> Tensor:
    """Log odds of keeping, of logits [..., 2] of skipping and keeping."""
    return logits[..., 1] - logits[..., 0]


def sparsity_loss(keep: Tensor) -> Tensor:
    """Mean over tasks and blocks of -log P(skip), of the log odds of keeping [K, N].

    As in the code that the authors released. The paper's equation 4 adds up log P(keep) instead, which falls without
    end and pulls harder at a gate the nearer it is to skipping, so that no block survives.
    """
    return F.softplus(keep).mean()


def sharing_loss(keep: Tensor, weights: Tensor) -> Tensor:
    """Distance between tasks (equation 5): weights[n] |P_k(keep) - P_j(keep)|, the mean over pairs and blocks.

    keep: log odds [K, N]; weights: [N]. 0 for one task.
    """
    chance, pairs = keep.sigmoid(), keep.shape[0] * (keep.shape[0] - 1)
    apart = (chance[:, None] - chance[None]).abs().sum((0, 1)) / max(pairs, 1)  # every pair stands in both twice
    return (apart * weights).mean()
