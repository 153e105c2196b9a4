"""What a DAG network is made of, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from den.dag.graph import Graph
from den.tasks import Task


@dataclass(frozen=True)
class DagConfig:
    """A network, complete and JSON-able: ``DagConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config``.

    Args:
        tasks: at least one; names are unique.
        states: N.
        flow: M, 1 to N - 1: how far ahead an edge may lead.
        channels: C of every state, a multiple of `groups`.
        trunk_size: side of the states' maps.
        groups: nested channel groups of each edge, of which a task may use the first few.
        gates: how deployed gates count: "soft", the sigmoid where kept; "bare", 1 where kept.

    Raises:
        ValueError: a value that does not fit, saying what must hold.
    """

    tasks: tuple[Task, ...]
    states: int = 8
    flow: int = 3
    channels: int = 48
    trunk_size: int = 16
    groups: int = 1
    gates: Literal["soft", "bare"] = "soft"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"DagConfig: tasks must be at least one, of unique names, got {names}")
        Graph(self.states, self.flow)
        for name in ("channels", "trunk_size", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"DagConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.channels % self.groups:
            raise ValueError(f"DagConfig: channels must be a multiple of groups = {self.groups}, got {self.channels}")
        if self.gates not in ("soft", "bare"):
            raise ValueError(f"DagConfig: gates must be 'soft' or 'bare', got {self.gates!r}")

    @property
    def graph(self) -> Graph:
        return Graph(self.states, self.flow)

    @property
    def edge_parameters(self) -> int:
        """Convolution weights of one edge."""
        return 9 * self.channels**2

    @property
    def edge_flops(self) -> int:
        """Twice the multiply-adds of one edge's convolution for one image."""
        return 2 * self.edge_parameters * self.trunk_size**2

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        values = asdict(self)
        return {**values, "tasks": list(values["tasks"])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DagConfig:
        """The config of :meth:`to_dict`'s output; ValueError for keys that are unknown or missing."""
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in data if key not in known]:
            raise ValueError(f"DagConfig: keys must be among {', '.join(known)}, got {', '.join(unknown)}")
        try:
            return cls(**{**data, "tasks": tuple(Task(**task) for task in data.get("tasks", ()))})
        except TypeError as error:
            raise ValueError(f"DagConfig: {error}") from error
