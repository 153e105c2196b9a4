"""The central graph: states in topological order, edges that reach at most M states ahead; and a task's part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Graph:
    """A restricted directed acyclic graph over `states` states, 0 to N - 1.

    Edge (i, j) exists for ``1 <= j - i <= flow``, which is M; edges stand in the order of j, then i.  M = N - 1 is the
    unrestricted graph.  There are ``M N - M (M + 1) / 2`` of them.

    stages: how many states, one after the other, have maps of each resolution; each stage halves the side.  Empty: all
    states have the same.

    Raises ValueError unless 1 <= flow < states, and for stages that do not add up to the states.
    """

    states: int
    flow: int
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("states", self.states), ("flow", self.flow)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"Graph: {name} must be a whole number, got {value!r}")
        if not 1 <= self.flow < self.states:
            raise ValueError(f"Graph: flow must be in 1..states - 1 = {self.states - 1}, got {self.flow}")
        stages = tuple(self.stages) or (self.states,)
        if sum(stages) != self.states or min(stages) < 1:
            raise ValueError(
                f"Graph: stages must be numbers of at least 1 that add up to states = {self.states}, got {list(stages)}"
            )
        object.__setattr__(self, "stages", stages)

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of each state, from 0."""
        return tuple(stage for stage, count in enumerate(self.stages) for _ in range(count))

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(i, j) of every edge."""
        return tuple((i, j) for j in range(self.states) for i in range(max(0, j - self.flow), j))

    @cached_property
    def incoming(self) -> tuple[tuple[int, ...], ...]:
        """Positions in `edges` of the edges into each state."""
        return tuple(tuple(e for e, (_, j) in enumerate(self.edges) if j == s) for s in range(self.states))

    @cached_property
    def outgoing(self) -> tuple[tuple[int, ...], ...]:
        """Positions in `edges` of the edges out of each state."""
        return tuple(tuple(e for e, (i, _) in enumerate(self.edges) if i == s) for s in range(self.states))

    def whole(self) -> SubGraph:
        """The sub-graph of all items: every edge, and every state's read-in and read-out."""
        return SubGraph(self, (True,) * len(self.edges), (True,) * self.states, (True,) * self.states)


@dataclass(frozen=True)
class Item:
    """Item that a reduction may remove: an edge, the read-in of a state or the read-out of a state.

    The source of the flow counts as state -1 and its sink as state N, so that every item leads from `tail` to `head`.
    """

    kind: str  # "edge", "read-in" or "read-out"
    index: int  # edge or state
    tail: int
    head: int

    @property
    def span(self) -> int:
        return self.head - self.tail


KINDS = ("edge", "read-in", "read-out")


@dataclass(frozen=True)
class SubGraph:
    """Sub-graph that one task keeps."""

    graph: Graph
    edges: tuple[bool, ...]  # [E], in the order of graph.edges
    read_in: tuple[bool, ...]  # [N]
    read_out: tuple[bool, ...]  # [N]

    def __post_init__(self) -> None:
        for name, size in (("edges", len(self.graph.edges)), ("read_in", self.graph.states),
                           ("read_out", self.graph.states)):  # fmt: skip
            if len(getattr(self, name)) != size:
                raise ValueError(f"SubGraph: {name} must be {size} booleans, got {len(getattr(self, name))}")

    def items(self) -> list[Item]:
        """Everything it keeps."""
        states = self.graph.states
        return [
            *(Item("edge", e, *self.graph.edges[e]) for e in _true(self.edges)),
            *(Item("read-in", j, -1, j) for j in _true(self.read_in)),
            *(Item("read-out", j, j, states) for j in _true(self.read_out)),
        ]

    def count(self, kind: str) -> int:
        """Number of items of a kind that are kept."""
        return sum(self._flags(kind))

    def keeps(self, item: Item) -> bool:
        return self._flags(item.kind)[item.index]

    def without(self, item: Item) -> SubGraph:
        """This sub-graph less one item."""
        flags = {kind: list(self._flags(kind)) for kind in KINDS}
        flags[item.kind][item.index] = False
        return SubGraph(self.graph, *(tuple(flags[kind]) for kind in KINDS))

    def clean(self) -> SubGraph:
        """This sub-graph less the items of dead states, which the source does not reach or which do not reach the sink.

        One sweep forward, one backward; ``s.clean().clean() == s.clean()``.
        """
        reached, reaching = self._reached(), self._reaching()
        live = [f and b for f, b in zip(reached, reaching, strict=True)]
        return SubGraph(
            self.graph,
            tuple(
                kept and live[i] and live[j]
                for kept, (i, j) in zip(self.edges, self.graph.edges, strict=True)
            ),
            tuple(kept and live[j] for j, kept in enumerate(self.read_in)),
            tuple(kept and live[j] for j, kept in enumerate(self.read_out)),
        )  # fmt: skip

    def has_path(self) -> bool:
        """True where a path leads from the source to the sink."""
        return any(out and reached for out, reached in zip(self.read_out, self._reached(), strict=True))

    @property
    def live_states(self) -> tuple[int, ...]:
        """The states on a path from the source to the sink."""
        both = zip(self._reached(), self._reaching(), strict=True)
        return tuple(j for j, (forward, backward) in enumerate(both) if forward and backward)

    @property
    def depth(self) -> int:
        """Edges on the longest path from the source to the sink; 0 where every path is a read-in and a read-out."""
        longest = [0 if kept else -1 for kept in self.read_in]
        for e in _true(self.edges):
            i, j = self.graph.edges[e]
            if longest[i] >= 0:
                longest[j] = max(longest[j], longest[i] + 1)
        return max((longest[j] for j in _true(self.read_out)), default=0)

    @property
    def width(self) -> int:
        """Most edges out of one state."""
        kept = [sum(self.edges[e] for e in edges) for edges in self.graph.outgoing]
        return max(kept)

    @property
    def sparsity(self) -> float:
        """Share of the graph's edges that it keeps, |E_k| / |E|."""
        return sum(self.edges) / len(self.edges)

    def _flags(self, kind: str) -> tuple[bool, ...]:
        return {"edge": self.edges, "read-in": self.read_in, "read-out": self.read_out}[kind]

    def _reached(self) -> list[bool]:
        reached = list(self.read_in)
        for e in _true(self.edges):  # in the order of heads, so that every tail is settled before
            i, j = self.graph.edges[e]
            reached[j] = reached[j] or reached[i]
        return reached

    def _reaching(self) -> list[bool]:
        reaching = list(self.read_out)
        for i in reversed(range(self.graph.states)):
            reaching[i] = reaching[i] or any(
                self.edges[e] and reaching[self.graph.edges[e][1]] for e in self.graph.outgoing[i]
            )
        return reaching


def _true(flags: Iterable[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]
