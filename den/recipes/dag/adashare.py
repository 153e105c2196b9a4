"""AdaShare on the graph (Sun et al., NeurIPS 2020): which edges each task runs, drawn from a policy that is learned.

The policy of task k runs edge e with probability ``sigmoid(gamma[k, e])``, the difference of the paper's two logits.
Weights and policy learn in turn from the halves of the training images, through Gumbel-softmax samples that harden as
the temperature falls; then every task's edges are drawn for good, and the weights trained anew from the start.  All
states are read in and read out.  What the paper calls a block is an edge here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from den.dag.graph import Graph, SubGraph
from den.dag.losses import task_loss
from den.data import Batch
from den.recipes.adashare import sharing_loss, sparsity_loss
from den.recipes.dag.recipe import SearchRecipe, new_network
from den.support.device import sent
from den.train.engine import Engine
from den.train.objective import Objective


def adashare_step(engine: Engine[SearchRecipe], batch: Batch) -> None:
    """Update the weights on `batch` and the policy on a batch of the other half, each with its own draw."""
    config, model, temperature = engine.config, engine.model, engine.recipe.temperature(engine)
    peers, gates, weights = config.peers, model.gates, engine.recipe.loss_weights
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + engine.position.total_steps)
    with gates.drawn(logistic_noise(gates.gamma, generator), temperature), engine.autocast():
        loss, first = task_loss(model, batch, weights)
    engine.update(Objective(loss, None, ("weights",)))
    batch = engine.batch("gates")
    with gates.drawn(logistic_noise(gates.gamma, generator), temperature), engine.autocast():
        loss, measured = task_loss(model, batch, weights)
    sparsity, sharing = sparsity_loss(gates.gamma), sharing_loss(gates.gamma, edge_weights(model.graph, gates.gamma))
    measured = {**measured, **first, "sparsity": sparsity.detach(), "sharing": sharing.detach()}
    engine.update(Objective(loss + peers.sparsity * sparsity + peers.sharing * sharing, measured, ("gates",)))


def logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Differences of two Gumbel variables, in the shape, dtype and device of `like`."""
    eps = torch.finfo(torch.float32).eps
    noise = torch.rand(like.shape, generator=generator).clamp(eps, 1 - eps).logit()
    return sent(noise.to(like.dtype), like.device)


def edge_weights(graph: Graph, like: Tensor) -> Tensor:
    """Weights [E] of edges (i, j) in the sharing loss: (N - j) / N, so that tasks share early states and part late."""
    weights = [(graph.states - j) / graph.states for _, j in graph.edges]
    return sent(torch.tensor(weights, dtype=like.dtype), like.device)


@torch.no_grad()
def draw_policies(engine: Engine[SearchRecipe]) -> None:
    """Let every task keep edges drawn from its policy, and begin the weights anew."""
    model, config = engine.model, engine.config
    generator = torch.Generator().manual_seed(config.seed)
    whole, run = model.graph.whole(), model.gates.gamma.sigmoid().cpu()
    kept = torch.rand(run.shape, generator=generator) < run
    for k in range(len(model.tasks)):
        model.keep(k, SubGraph(model.graph, tuple(kept[k].tolist()), whole.read_in, whole.read_out))
    fresh = new_network(config, model.tasks).state_dict()
    model.load_state_dict({name: t for name, t in fresh.items() if not name.startswith("gates.")}, strict=False)
