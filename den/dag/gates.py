"""The gates of every task: sigmoids of the logits of read-in, read-out and connectivity, which are learned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from den.dag.graph import Graph, SubGraph
from den.dag.reduction import TaskGates

SPREAD_WARNING = 0.15


class Gates(nn.Module):
    """Logits of K tasks, all 0 at first: every gate is then 1/2.

    Attributes:
        alpha, beta: float [K, N]: read-in and read-out of each state.
        gamma: float [K, E]: edges.
        edge_levels: int32 [K, E] in 0..groups: channel groups of each edge that each task uses; 0 where it dropped it.
        kept_in, kept_out: bool [K, N].
    """

    edge_levels: Tensor
    kept_in: Tensor
    kept_out: Tensor

    def __init__(self, graph: Graph, tasks: int, groups: int = 1) -> None:
        super().__init__()
        self.graph, self.groups = graph, groups
        self.alpha = nn.Parameter(torch.zeros(tasks, graph.states))
        self.beta = nn.Parameter(torch.zeros(tasks, graph.states))
        self.gamma = nn.Parameter(torch.zeros(tasks, len(graph.edges)))
        self.register_buffer("edge_levels", torch.full((tasks, len(graph.edges)), groups, dtype=torch.int32))
        self.register_buffer("kept_in", torch.ones(tasks, graph.states, dtype=torch.bool))
        self.register_buffer("kept_out", torch.ones(tasks, graph.states, dtype=torch.bool))
        self._draw: tuple[Tensor, float, int] | None = None

    def values(self, bare: bool = False) -> tuple[Tensor, ...]:
        """Gates of what is kept, 0 elsewhere: read-in [K, N], edges [K, E], read-out [K, N]; bare: 1 where kept."""
        kept = self.kept_in, self.edge_levels > 0, self.kept_out
        if self._draw is not None:
            noise, temperature, first = self._draw
            edges = ((self.gamma + noise) / temperature).sigmoid()
            edges = torch.where(kept[1], torch.cat([torch.ones_like(edges[:, :first]), edges[:, first:]], 1), 0)
            return kept[0].to(edges.dtype), edges, kept[2].to(edges.dtype)
        if bare:
            return tuple(mask.to(self.gamma.dtype) for mask in kept)
        logits = self.alpha, self.gamma, self.beta
        return tuple(torch.where(mask, x.sigmoid(), 0) for mask, x in zip(kept, logits, strict=True))

    @contextmanager
    def drawn(self, noise: Tensor, temperature: float, first: int = 0) -> Iterator[None]:
        """Context in which the edges' gates are samples of AdaShare's policies, those of read-in and read-out 1.

        A sample is ``sigmoid((gamma + noise) / temperature)``; noise: [K, E].  Edges before `first` have the gate 1
        too.
        """
        self._draw = noise, temperature, first
        try:
            yield
        finally:
            self._draw = None

    def block_levels(self) -> Tensor:
        """Levels of all that a batch is routed through, int32 [K, E + 2 (S - 1)]: the edges, then of each stage after
        the first of the S stages its read-in and its read-out, whole where the task keeps one of its states'."""
        ends, stages = [], self.graph.stages
        for first, count in zip(accumulate(stages), stages[1:], strict=False):
            ends += [kept[:, first : first + count].any(1) for kept in (self.kept_in, self.kept_out)]
        if not ends:
            return self.edge_levels
        return torch.cat([self.edge_levels, self.groups * torch.stack(ends, 1).to(torch.int32)], 1)

    def of_task(self, task: int) -> TaskGates:
        """The gates of one task, 0 where it does not keep the item."""
        read_in, edges, read_out = (rows[task].detach().tolist() for rows in self.values())
        return TaskGates(read_in, read_out, edges)

    def structure(self, task: int) -> SubGraph:
        """The sub-graph that a task keeps."""
        rows = (self.edge_levels[task] > 0, self.kept_in[task], self.kept_out[task])
        return SubGraph(self.graph, *(tuple(row.tolist()) for row in rows))

    @torch.no_grad()
    def keep(self, task: int, kept: SubGraph, levels: Sequence[int] | None = None) -> None:
        """Let a task keep what `kept` holds, and of every edge all channel groups or the first ``levels[e]``.

        Raises ValueError for a sub-graph of another graph, without a path, or levels outside 0..groups.
        """
        if kept.graph != self.graph:
            raise ValueError(f"Gates: kept must be part of {self.graph}, got part of {kept.graph}")
        if not kept.has_path():
            raise ValueError(f"Gates: kept must hold a path from a read-in to a read-out, got none for task {task}")
        chosen = [self.groups] * len(kept.edges) if levels is None else list(levels)
        if len(chosen) != len(kept.edges) or min(chosen) < 0 or max(chosen) > self.groups:
            raise ValueError(f"Gates: levels must be {len(kept.edges)} numbers in 0..{self.groups}, got {chosen}")
        used = [level if flag else 0 for flag, level in zip(kept.edges, chosen, strict=True)]
        self.edge_levels[task] = torch.tensor(used, dtype=torch.int32)
        self.kept_in[task] = torch.tensor(kept.read_in)
        self.kept_out[task] = torch.tensor(kept.read_out)

    def spread(self) -> Tensor:
        """Standard deviation of every task's edge gates: float [K].

        Where it stays small the flow follows the position in the graph, and all tasks keep the same edges.
        """
        return self.gamma.detach().sigmoid().std(1, correction=0)


def squeeze_loss(gamma: Tensor, kappa: float) -> Tensor:
    """``sum over tasks of max(sum of sigmoid(gamma^k) - kappa, 0)`` for logits [K, E]; kappa in edges."""
    return (gamma.sigmoid().sum(1) - kappa).clamp_min(0).sum()
