"""Levels of elastic edges: how many of an edge's nested channel groups a task uses.

While the topology is searched for, tasks use all groups or random numbers of them, so that the first ones learn to do
without the others, as in the training of Deep Elastic Networks.  After the reduction each task gives up, one after the
other, the last groups of those edges that cost least loss.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from den.dag.losses import batch_losses
from den.dag.network import DagNetwork
from den.data import Batch
from den.support.progress import progress
from den.train.engine import Engine

BATCHES = 2  # that a loss is measured on


@contextmanager
def random_levels(model: DagNetwork, generator: torch.Generator) -> Iterator[None]:
    """Context in which half of the tasks, at random, use a random number of the groups of each of their edges."""
    levels, groups = model.gates.edge_levels, model.gates.groups
    if groups == 1:
        yield
        return
    before = levels.clone()
    drawn = torch.randint(1, groups + 1, before.shape, generator=generator, dtype=torch.int32)
    whole = torch.rand(len(before), 1, generator=generator) < 0.5
    levels.copy_(torch.where(whole.to(levels.device), before, torch.minimum(before, drawn.to(levels.device))))
    try:
        yield
    finally:
        levels.copy_(before)


@torch.no_grad()
def choose_levels(engine: Engine[Any]) -> None:
    """Let every task give up the share `reduction.levels` of the channel groups of its edges."""
    model, share, groups = engine.model, engine.config.reduction.levels, engine.model.gates.groups
    if groups == 1 or share == 0:
        return
    halved = engine.config.training.search == "alternating"
    stream = engine.batches["gates" if halved else "all"]
    batches = [stream.next() for _ in range(BATCHES)]
    training = model.training
    model.eval()
    levels: list[list[int]] = model.gates.edge_levels.tolist()
    kept = [[e for e, level in enumerate(row) if level] for row in levels]
    left = [min(math.floor(share * groups * len(edges)), (groups - 1) * len(edges)) for edges in kept]
    steps = range(max(left, default=0))
    for step in progress(steps, "levels") if engine.config.progress else steps:
        candidates = [
            [e for e in edges if row[e] > 1] if step < count else []
            for row, edges, count in zip(levels, kept, left, strict=True)
        ]
        losses = _losses(model, batches, levels, candidates)
        for k, found in enumerate(losses):
            if found:
                levels[k][min(found, key=found.__getitem__)] -= 1
    model.gates.edge_levels.copy_(torch.tensor(levels, dtype=torch.int32))
    model.train(training)


def _losses(
    model: DagNetwork, batches: list[Batch], levels: list[list[int]], candidates: list[list[int]]
) -> list[dict[int, float]]:
    """Loss of each task with one of its candidate edges at one level less, by edge; all tasks try one at a time."""
    found: list[dict[int, float]] = [{} for _ in candidates]
    for number in range(max(map(len, candidates))):
        tried = [row.copy() for row in levels]
        for row, edges in zip(tried, candidates, strict=True):
            if number < len(edges):
                row[edges[number]] -= 1
        model.gates.edge_levels.copy_(torch.tensor(tried, dtype=torch.int32))
        losses = sum(batch_losses(model, batch)[0].double() for batch in batches)
        for k, (edges, loss) in enumerate(zip(candidates, losses.tolist(), strict=True)):  # type: ignore[union-attr]
            if number < len(edges):
                found[k][edges[number]] = loss
    return found
