"""Flow-based reduction: which edges, read-ins and read-outs of the graph a task keeps.

The idea, to delete the least important edges by the flow through them, is that of Choi and Im (CVPR 2023); the
algorithm in its details is this library's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from den.dag.graph import KINDS, Graph, Item, SubGraph

Ranking = Literal["flow", "gates", "random"]
ROUNDING = 1e-9  # so that a share of 0.3 of 10 is 3, not 2.9999


@dataclass(frozen=True)
class TaskGates:
    """The gates of one task, each in 0..1: sigmoids of its logits."""

    read_in: Sequence[float]  # [N]
    read_out: Sequence[float]  # [N]
    edges: Sequence[float]  # [E]

    def of(self, item: Item) -> float:
        return {"edge": self.edges, "read-in": self.read_in, "read-out": self.read_out}[item.kind][item.index]

    def of_what_is(self, kept: SubGraph) -> TaskGates:
        """The gates with 0 for each item that is not kept."""
        pairs = (self.read_in, kept.read_in), (self.read_out, kept.read_out), (self.edges, kept.edges)
        return TaskGates(*([g * flag for g, flag in zip(*pair, strict=True)] for pair in pairs))


@dataclass(frozen=True)
class Flow:
    """Flow of one unit of mass from the source to the sink."""

    read_in: tuple[float, ...]  # [N]: from the source into each state; adds up to 1
    edges: tuple[float, ...]  # [E]: along each edge
    read_out: tuple[float, ...]  # [N]: from each state to the sink; adds up to 1

    def of(self, item: Item) -> float:
        return {"edge": self.edges, "read-in": self.read_in, "read-out": self.read_out}[item.kind][item.index]


@dataclass(frozen=True)
class Reduction:
    """Sub-graph that a task keeps, and the numbers of items that it was to keep."""

    kept: SubGraph
    targets: dict[str, int]  # by kind of item that may be removed for its own sake

    @property
    def missed(self) -> dict[str, int]:
        """Items kept beyond the target (negative: fewer), by kind, of the kinds that missed theirs."""
        found = {kind: self.kept.count(kind) - wanted for kind, wanted in self.targets.items()}
        return {kind: excess for kind, excess in found.items() if excess}

    def explain(self) -> str:
        """One sentence on targets that were missed; empty where none was."""
        parts = [
            f"{self.kept.count(kind)} of {kind} where {self.targets[kind]} were wanted" for kind in self.missed
        ]  # fmt: skip
        if not parts:
            return ""
        reason = "removing more would cut the last path or take more than wanted of another kind"
        return f"the reduction kept {', '.join(parts)}: " + (reason if self.kept.has_path() else "no path is left")


def flow(graph: Graph, gates: TaskGates) -> Flow:
    """Divide a unit of mass over the whole graph, in proportion to the gates.

    Into state j goes ``a_j / sum(a)`` from the source; what arrives in a state leaves over its edges and its read-out
    in proportion to their gates.

    Raises ValueError for gates of another number, outside 0..1, or a state that mass arrives in and cannot leave.
    """
    _check(graph, gates)
    total = sum(gates.read_in)
    read_in = tuple(a / total for a in gates.read_in)
    edges, read_out = [0.0] * len(graph.edges), [0.0] * graph.states
    for j in range(graph.states):
        mass = read_in[j] + sum(edges[e] for e in graph.incoming[j])
        leaving = gates.read_out[j] + sum(gates.edges[e] for e in graph.outgoing[j])
        if mass == 0:  # a dead state, whose gates may all be 0
            continue
        if not leaving > 0:
            raise ValueError(f"flow: a state must have a gate above 0 to leave by, got none for state {j}")
        for e in graph.outgoing[j]:
            edges[e] = mass * gates.edges[e] / leaving
        read_out[j] = mass * gates.read_out[j] / leaving
    return Flow(read_in, tuple(edges), tuple(read_out))


def targets(start: SubGraph, ratio: float, ends: float | None = None) -> dict[str, int]:
    """Items of each kind to be kept when the share `ratio` of the edges, and `ends` of read-ins and read-outs, is
    removed.

    Without `ends` these have no number to be kept: they go where their state is dead.

    >>> targets(Graph(8, 3).whole(), 0.5), targets(Graph(8, 3).whole(), 0.5, ends=0.25)
    ({'edge': 9}, {'edge': 9, 'read-in': 6, 'read-out': 6})
    """
    wanted = {}
    for kind in KINDS if ends is not None else ("edge",):
        name, share = ("ratio", ratio) if kind == "edge" or ends is None else ("ends", ends)
        if not 0 <= share <= 1:
            raise ValueError(f"reduce: {name} must be in 0..1, got {share}")
        wanted[kind] = start.count(kind) - math.floor(share * start.count(kind) + ROUNDING)
    return wanted


def reduce(
    start: Graph | SubGraph,
    gates: TaskGates,
    ratio: float,
    *,
    ends: float | None = None,
    ranking: Ranking = "flow",
    rerank: bool = False,
    guard: bool = True,
    seed: int = 0,
) -> Reduction:
    """Remove the least important edges until the share `ratio` of them is gone, and with `ends` of read-ins and
    read-outs.

    Items go in ascending order of their importance (ties: longer span first, then larger head); after each, everything
    on no path from the source to the sink goes too.

    Args:
        start: the graph, or what is left of it; the gates of what is not must be 0 for the flow to pass it by.
        ends: share of the read-ins, and of the read-outs, to be removed; None: only those of dead states go.
        ranking: importance is the flow through an item; its gate; or a random number of `seed`.
        rerank: after every removal let the flow find its way through what is left, and go on by that.
        guard: take a step back wherever it would leave no path, or fewer of any kind than its target.  Without it whole
            branches die, more is removed than asked for, and no path may be left.

    Raises ValueError for gates or shares that do not fit, and `rerank` of another ranking than by flow.
    """
    if rerank and ranking != "flow":
        raise ValueError(f"reduce: ranking must be flow to rerank, got {ranking!r}")
    kept = start.whole() if isinstance(start, Graph) else start.clean()
    wanted = targets(kept, ratio, ends)
    order = ranked(kept.graph, gates, ranking, seed)
    while order:
        item, *order = order
        if item.kind not in wanted or not kept.keeps(item) or kept.count(item.kind) <= wanted[item.kind]:
            continue
        trial = kept.without(item).clean()
        enough = all(trial.count(kind) >= least for kind, least in wanted.items())
        if guard and not (enough and trial.has_path()):
            continue
        kept = trial
        if rerank and kept.has_path():
            left = set(order)  # what was refused once stays: of a smaller graph it would take no less
            order = [each for each in ranked(kept.graph, gates.of_what_is(kept), ranking) if each in left]
    return Reduction(kept, wanted)


def ranked(graph: Graph, gates: TaskGates, ranking: Ranking, seed: int = 0) -> list[Item]:
    """All items, the least important first."""
    items = graph.whole().items()
    if ranking == "random":
        generator = random.Random(seed)
        return generator.sample(items, len(items))
    if ranking == "gates":
        _check(graph, gates)
        importance = gates.of
    elif ranking == "flow":
        importance = flow(graph, gates).of
    else:
        raise ValueError(f"reduce: ranking must be flow, gates or random, got {ranking!r}")
    return sorted(items, key=lambda item: (importance(item), -item.span, -item.head))


def _check(graph: Graph, gates: TaskGates) -> None:
    for name, size in (("read_in", graph.states), ("read_out", graph.states), ("edges", len(graph.edges))):
        values = getattr(gates, name)
        if len(values) != size or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"flow: {name} must be {size} gates in 0..1, got {list(values)}")
    if not sum(gates.read_in) > 0:
        raise ValueError("flow: read_in must hold a gate above 0, got none")
