"""AdaShare on the graph (Sun et al., NeurIPS 2020): which edges each task runs, drawn from a policy that is learned.

The policy of task k runs edge e with probability ``sigmoid(gamma[k, e])``, the difference of the paper's two logits.
Weights and policy learn in turn from the halves of the training images, through Gumbel-softmax samples that harden as
the temperature falls, and of one state's edges more at a time, the last ones first, as the paper's curriculum has it.
Then several policies are drawn of each task, and the weights trained anew from the start with the best of them.  All
states are read in and read out.  What the paper calls a block is an edge here.

The paper trains all the networks that it draws, and reports the best.  Here the best is chosen before training, by its
loss under the weights of the search, on held-out images or, without any, on the half that the policy was learned from.
"""

from dataclasses import replace

import torch
from torch import Tensor

from den.dag.evaluate import evaluate_tasks
from den.dag.graph import Graph, SubGraph
from den.dag.network import DagNetwork
from den.data import Batch
from den.recipes.adashare import sharing_loss, sparsity_loss
from den.recipes.dag.recipe import SearchRecipe, new_network
from den.support.device import sent
from den.train.engine import Engine
from den.train.objective import Objective


def adashare_step(engine: Engine[SearchRecipe], batch: Batch) -> None:
    """Update the weights on `batch` and the policy on a batch of the other half, each with its own draw."""
    recipe, gates, peers = engine.recipe, engine.model.gates, engine.config.peers
    temperature, first_edge = recipe.temperature(engine), first_learned(engine)
    generator = torch.Generator().manual_seed(engine.config.seed * 1_000_003 + engine.position.total_steps)
    with gates.drawn(logistic_noise(gates.gamma, generator), temperature, first_edge):
        first = recipe.objective(engine, batch, ("weights",))
    engine.update(replace(first, measured=None))
    with gates.drawn(logistic_noise(gates.gamma, generator), temperature, first_edge):
        losses, measured = recipe.loss(engine, engine.batch("gates"))
    policy, shared = gates.gamma[:, first_edge:], edge_weights(engine.model.graph, gates.gamma)[first_edge:]
    sparsity, sharing = sparsity_loss(policy), sharing_loss(policy, shared)
    told = {**measured, **(first.measured or {}), "sparsity": sparsity.detach(), "sharing": sharing.detach()}
    total = losses.sum() + peers.sparsity * sparsity + peers.sharing * sharing
    engine.update(Objective(total, told, ("gates",)))


def logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Differences of two Gumbel variables, in the shape, dtype and device of `like`."""
    eps = torch.finfo(torch.float32).eps
    noise = torch.rand(like.shape, generator=generator).clamp(eps, 1 - eps).logit()
    return sent(noise.to(like.dtype), like.device)


def edge_weights(graph: Graph, like: Tensor) -> Tensor:
    """Weights [E] of edges (i, j) in the sharing loss: (N - j) / N, so that tasks share early states and part late."""
    weights = [(graph.states - j) / graph.states for _, j in graph.edges]
    return sent(torch.tensor(weights, dtype=like.dtype), like.device)


def first_learned(engine: Engine[SearchRecipe]) -> int:
    """The first of the edges whose policy is learned by now, which are the last ones of the graph.

    First those into the last state, and of one state more at a time until half of the search is over.
    """
    graph = engine.model.graph
    if not engine.config.peers.curriculum:
        return 0
    learned = 1 + int(2 * engine.progress * (graph.states - 1))  # states, the last ones
    return next((e for e, (_, j) in enumerate(graph.edges) if j >= graph.states - learned), 0)


@torch.no_grad()
def draw_policies(engine: Engine[SearchRecipe]) -> None:
    """Let every task keep edges drawn from its policy, the best of several draws, and begin the weights anew."""
    model, config = engine.model, engine.config
    generator = torch.Generator().manual_seed(config.seed)
    run = model.gates.gamma.sigmoid().cpu()
    draws = [torch.rand(run.shape, generator=generator) < run for _ in range(config.peers.draws)]
    losses = [[0.0] * len(model.tasks)] if len(draws) == 1 else []  # of every draw, task by task
    for kept in draws if len(draws) > 1 else []:
        keep_edges(model, kept)
        results = evaluate_tasks(model, engine.recipe.held_out or engine.batches["gates"].sets)
        losses.append([results[task.name].loss for task in model.tasks])
    best = torch.tensor(losses).argmin(0).tolist()
    keep_edges(model, torch.stack([draws[n][k] for k, n in enumerate(best)]))
    fresh = new_network(config, model.tasks).state_dict()
    model.load_state_dict({name: t for name, t in fresh.items() if not name.startswith("gates.")}, strict=False)


def keep_edges(model: DagNetwork, kept: Tensor) -> None:
    """Let every task keep the edges where `kept`, bool [K, E], is True, and all read-ins and read-outs."""
    whole = model.graph.whole()
    for k, edges in enumerate(kept.tolist()):
        model.keep(k, SubGraph(model.graph, tuple(edges), whole.read_in, whole.read_out))
