"""The three stages: warm-up, search, and after the reduction fine-tuning (Choi and Im, CVPR 2023).

The order of the stages, the squeeze loss and the reduction by flow are the paper's.  How the search alternates, how
long a stage takes, and the reduction in its details are this library's.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from den.dag.config import SEARCHING, DagTrainConfig
from den.dag.gates import SPREAD_WARNING, squeeze_loss
from den.dag.network import DagNetwork
from den.dag.reduction import reduce
from den.data import Batch, BatchStream
from den.recipes.dag.adashare import adashare_step, draw_policies
from den.recipes.dag.levels import choose_levels
from den.recipes.dag.recipe import DataOf, SearchRecipe
from den.train.engine import Engine
from den.train.objective import Objective


def train(config: DagTrainConfig, *, resume: bool = False, data: DataOf | None = None) -> DagNetwork:
    """Train a network as `config` says and return it, in evaluation mode; its run folder is `config.out`.

    resume: continue the run in that folder from its last checkpoint, with the losses it would have had uninterrupted.
    data: gives the tasks and batches, see `TaskData`; None: those of the scenario.

    The global generators of Python, numpy and torch begin at `config.seed` meanwhile, or where the checkpoint has them,
    and stand afterwards where they stood before the call.

    Raises ValueError for settings that do not fit, a folder that is in use or cannot be used, and a loss that is not
    finite.
    """
    with Engine(config, partial(SearchRecipe, data=data), resume=resume) as engine:
        for batch in engine.phase("warm-up"):  # all gates at 1/2
            train_step(engine, batch)
        for batch in engine.phase("search"):
            (adashare_step if config.mode == "adashare" else search_step)(engine, batch)
        if config.mode in SEARCHING and not engine.recipe.reduced:
            (draw_policies if config.mode == "adashare" else reduce_tasks)(engine)
            choose_levels(engine)
            reestimate_norms(engine.model, engine.batches["all"], config.reduction.norm_batches)
            mark_reduced(engine)
        for batch in engine.phase("fine-tuning"):  # gates rest
            train_step(engine, batch)
        return engine.model.eval()


def train_step(engine: Engine[SearchRecipe], batch: Batch) -> None:
    """Update the weights once."""
    engine.update(engine.recipe.objective(engine, batch))


def search_step(engine: Engine[SearchRecipe], batch: Batch) -> None:
    """Update the weights and the gates once, in the order of `training.search`."""
    training, model, recipe = engine.config.training, engine.model, engine.recipe
    squeeze = squeeze_loss(model.gates.gamma, training.kappa * len(model.graph.edges))
    extra = training.squeeze * squeeze
    if training.search == "alternating":
        first = recipe.objective(engine, batch, ("weights",))
        engine.update(replace(first, measured=None))
        losses, told = recipe.loss(engine, engine.batch("gates"))
        weights = cast(dict[str, Tensor], first.measured)
        told = {**told, **weights, "gate_loss": told["loss"], "squeeze": squeeze.detach()}
        engine.update(Objective(losses.sum() + extra, told, ("gates",)))
        return
    shared_weights_learn(model, training.search != "frozen")
    objective = recipe.objective(engine, batch, ("gates", "weights"), extra)
    told = cast(dict[str, Tensor], objective.measured)
    engine.update(replace(objective, measured={**told, "gate_loss": told["loss"], "squeeze": squeeze.detach()}))
    shared_weights_learn(model, True)


def shared_weights_learn(model: DagNetwork, learn: bool) -> None:
    """Let the weights that tasks share, of edges and of the stages' read-ins and read-outs, learn or rest."""
    for shared in (model.edges, model.stages):
        shared.requires_grad_(learn)


def reduce_tasks(engine: Engine[SearchRecipe]) -> None:
    """Let every task keep what the reduction leaves it.  Warns of missed targets and of gates that hardly differ."""
    model, settings = engine.model, engine.config.reduction
    spread = model.gates.spread().tolist()
    for k, task in enumerate(model.tasks):
        seed = engine.config.seed * len(model.tasks) + k
        found = reduce(
            model.structure(k), model.gates.of_task(k), settings.ratio,
            ends=settings.ends, ranking=settings.ranking, rerank=settings.rerank, guard=settings.guard, seed=seed,
        )  # fmt: skip
        if reason := found.explain():
            warnings.warn(f"{task.name}: {reason}", stacklevel=2)
        model.keep(k, found.kept)
    if settings.ranking == "flow" and min(spread) < SPREAD_WARNING:
        warnings.warn(
            f"the gates of some tasks differ little (standard deviation {min(spread):.3f} to {max(spread):.3f}, below"
            f" {SPREAD_WARNING}): their flow follows the position in the graph; search longer or raise"
            " training.gate_rate",
            stacklevel=2,
        )


def mark_reduced(engine: Engine[SearchRecipe]) -> None:
    """Remember, on disk too, that the reduction is done.  Momentum of what was does not enter fine-tuning."""
    engine.recipe.reduced = True
    engine.optimisers["weights"].state.clear()
    engine.save()


@torch.no_grad()
def reestimate_norms(model: DagNetwork, batches: BatchStream, count: int) -> None:
    """Take the running statistics of all batch norms anew, as plain means over `count` batches."""
    if count == 0:
        return
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    for number in range(1, count + 1):
        for norm in norms:
            norm.momentum = 1 / number  # with None torch reads from the device how many there were
        batch = batches.next()
        model(batch.images, batch.tasks)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
