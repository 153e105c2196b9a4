"""Algorithm 1 of the paper: estimator and selector trained in turn."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from den.data import Batch
from den.nn.model import DeepElasticNetwork
from den.recipes import METHODS, prepare, prepare_compared
from den.recipes.auxiliary import CostHead, cost_loss
from den.recipes.base import Method, logits_and_features
from den.recipes.distillation import distilled_loss, taught_loss
from den.support.device import sent
from den.support.randomness import uniform
from den.train.config import TrainConfig
from den.train.engine import Engine
from den.train.objective import (
    Objective,
    entropy,
    initial_structures,
    leave_one_out_advantage,
    reinforce,
    sample_structures,
    selected_structures,
    steered_rho,
    structure_costs,
)

PROBES = 128


def train(config: TrainConfig, *, resume: bool = False) -> DeepElasticNetwork:
    """Train a network as `config` says and return it, in evaluation mode; its run folder is `config.out`.

    resume: continue the run in that folder from its last checkpoint, with the losses it would have had uninterrupted.

    The global generators of Python, numpy and torch begin at `config.seed` meanwhile, or where the checkpoint has them,
    and stand afterwards where they stood before the call.

    Raises ValueError for settings that do not fit, a folder that is in use or cannot be used, and a loss that is not
    finite.
    """
    if config.mode in METHODS:
        return train_method(config, resume)
    with Engine(config, prepare, resume=resume) as engine:  # lines 1 and 2
        for stage in range(1, config.stages + 2):  # line 4; the last round is the estimator's finish
            for batch in engine.phase("estimator", stage):  # lines 5, 8 and 9
                structures = derive_structures(engine, stage, batch)  # line 6, with p of lines 3 and 14
                with engine.autocast():
                    objective = estimator_loss(engine, batch, structures)
                engine.update(objective)  # line 7
            for batch in engine.phase("selector", stage):  # lines 10, 12 and 13
                with engine.autocast():
                    objective = selector_loss(engine, batch)
                engine.update(objective)  # line 11
        return engine.model.eval()


def train_method(config: TrainConfig, resume: bool) -> DeepElasticNetwork:
    """The loop of every compared method: its phases, its objective."""
    with Engine(config, prepare_compared, resume=resume) as engine:
        for phase in engine.recipe.phases():
            for batch in engine.phase(*phase.key):
                with engine.autocast():
                    objective = engine.recipe.objective(engine, phase, batch)
                engine.update(objective)
        return engine.model.eval()


def first_structures(engine: Engine[Method], batch: Batch) -> Tensor:
    """Structures [B, N] of the initial distribution: equation 8, uniform, or drawn from the selector as it is."""
    model, settings = engine.model, engine.config.estimator
    if settings.initial == "selector":
        with torch.no_grad():
            return selected_structures(engine.recipe.choose(batch), batch.draws(engine.generator))
    tau = settings.tau if settings.initial == "equation8" else 0.0
    drawn = initial_structures(batch.count, model.num_blocks, model.levels, tau, batch.draws(engine.generator))
    return sent(drawn, engine.device)


def derive_structures(engine: Engine[Method], stage: int, batch: Batch) -> Tensor | None:
    """Structures [B, N] to train the estimator on: of the initial distribution, after stage 1 mostly of the selector.

    None stands for the full structure of a dense run.
    """
    settings = engine.config.estimator
    if engine.config.mode == "dense":
        return None
    initial = first_structures(engine, batch)
    if stage == 1:
        return initial
    with torch.no_grad():
        logits = engine.recipe.choose(batch)
    draws = batch.draws(engine.generator)
    selected = selected_structures(logits, draws if settings.structures == "sample" else None)
    keeps_initial = uniform((batch.count, 1), draws) < settings.initial_share
    return torch.where(sent(keeps_initial, engine.device), initial, selected)


def estimator_loss(engine: Engine[Method], batch: Batch, structures: Tensor | None) -> Objective:
    """The loss of equation 4; with `estimator.distill` also what the full structure or a trained network teaches."""
    if engine.recipe.teacher is not None:
        return taught_loss(engine.recipe, engine.recipe.teacher, batch, structures)
    if structures is None or not engine.config.estimator.distill:
        return engine.recipe.estimator_loss(batch, structures)
    return distilled_loss(engine.recipe, batch, structures, batch.draws(engine.generator))


def selector_loss(engine: Engine[Method], batch: Batch) -> Objective:
    """The REINFORCE estimate of equation 7, less the entropy bonus, plus the auxiliary loss if there is one.

    The measured loss is the mean cost R.
    """
    settings, model = engine.config.selector, engine.model
    logits, features = logits_and_features(model, batch)
    log_probabilities = logits.log_softmax(-1)  # [B, N, L]
    epsilon = settings.exploration ** engine.position.updates.get("selector", 0) if settings.exploration else 0.0
    draws = batch.draws(engine.generator)
    late = settings.late_samples is not None and selector_progress(engine) >= 0.5
    samples = settings.late_samples if late else settings.samples
    structures = sample_structures(log_probabilities, samples, epsilon, draws)  # [B, S, N]
    costs = structure_costs(model, batch, structures, sparsity_weights(engine, batch), settings.penalty)  # [B, S]
    if settings.baseline == "leave-one-out":
        advantage = leave_one_out_advantage(costs)
    else:
        advantage = engine.recipe.baseline.advantage(costs, batch) if settings.baseline == "running-mean" else costs
    bonus = settings.entropy_bonus * (1 - selector_progress(engine))
    loss = reinforce(log_probabilities, structures, advantage, bonus, batch.mean)
    if settings.auxiliary:
        predicted = cast(CostHead, engine.recipe.state.costs)(features, structures)
        loss = loss + settings.auxiliary * batch.mean(cost_loss(predicted, costs))
    variety = batch.mean(entropy(log_probabilities.detach()))
    ratio = engine.recipe.flops_ratio(structures.flatten(0, 1), batch)
    return Objective(loss, {"loss": batch.mean(costs), "flops_ratio": ratio, "entropy": variety})


def selector_progress(engine: Engine[Method]) -> float:
    """Share of the selector's updates that are done, over all its phases."""
    return min(1.0, engine.position.updates.get("selector", 0) / engine.planned["selector"])


def sparsity_weights(engine: Engine[Method], batch: Batch) -> float | Tensor:
    """rho of the batch: the setting, or with a budget what steers each task to it, [B, 1]."""
    settings = engine.config.selector
    if settings.budget is None:
        return settings.rho
    weights = steered_rho(settings.rho, task_costs(engine), settings.budget).float()
    parts = zip(weights[: len(batch.parts)], batch.parts, strict=True)
    return torch.cat([weight.expand(len(labels), 1) for weight, (_, _, labels) in parts])


@torch.no_grad()
def task_costs(engine: Engine[Method]) -> Tensor:
    """Share of the full FLOPs that each task's likeliest structures cost in use: float64 [K].

    Measured on `PROBES` training images of each, without the augmentation (which changes what digits cost by a tenth)
    and with the selector in evaluation mode.
    """
    selector, costs = engine.model.selector.eval(), []
    for image_set in engine.recipe.sets:
        index = sent(torch.randint(len(image_set), (PROBES,), generator=engine.generator), engine.device)
        likeliest = engine.model.select(image_set.inputs(index), image_set.name)
        costs.append(torch.as_tensor(engine.recipe.flops_ratio(likeliest)))
    selector.train()
    return torch.stack(costs).double()
