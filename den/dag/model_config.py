"""Description of a DAG network as plain data: its graph, width, tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from den.dag.graph import Graph
from den.nn.tasks import Task
from den.support.settings import from_dict, to_dict


@dataclass(frozen=True)
class DagConfig:
    """A network, complete and JSON-able: ``DagConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config``.

    Args:
        tasks: at least one; names are unique.
        states: N.
        flow: M, 1 to N - 1: how far ahead an edge may lead.
        channels: C of every state, a multiple of `groups`; with stages, of the first one's: stage s has 2^s C.
        trunk_size: side of the states' maps, or (height, width); with stages, of the first one's.  With a dense task a
            quarter of its images, rounded up.
        groups: nested channel groups of each edge, of which a task may use the first few: of the output of a
            convolution, of the hidden channels of a residual block.
        gates: how deployed gates count: "soft", the sigmoid where kept; "bare", 1 where kept.
        stages: states of each resolution, see `Graph`; empty: all have the same.
        edge: "conv", convolution, batch norm and ReLU; "residual", the elastic block of Deep Elastic Networks.
        stem: "conv", or layers of a published network, see `den.dag.stem.PretrainedStem`; `trunk_size` is then the size
            of their maps.

    Raises:
        ValueError: a value that does not fit, saying what must hold.
    """

    tasks: tuple[Task, ...]
    states: int = 8
    flow: int = 3
    channels: int = 48
    trunk_size: int | tuple[int, int] = 16
    groups: int = 1
    gates: Literal["soft", "bare"] = "soft"
    stages: tuple[int, ...] = ()
    edge: Literal["conv", "residual"] = "conv"
    stem: str = "conv"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not isinstance(self.trunk_size, int):
            height, width = self.trunk_size
            object.__setattr__(self, "trunk_size", height if height == width else (height, width))
        object.__setattr__(self, "stages", tuple(self.stages))
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"DagConfig: tasks must be at least one, of unique names, got {names}")
        Graph(self.states, self.flow, self.stages)
        for name, value in (("channels", self.channels), ("trunk_size", min(self.map_size())), ("groups", self.groups)):
            if value < 1:
                raise ValueError(f"DagConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.channels % self.groups:
            raise ValueError(f"DagConfig: channels must be a multiple of groups = {self.groups}, got {self.channels}")
        if self.gates not in ("soft", "bare"):
            raise ValueError(f"DagConfig: gates must be 'soft' or 'bare', got {self.gates!r}")
        if self.edge not in ("conv", "residual"):
            raise ValueError(f"DagConfig: edge must be 'conv' or 'residual', got {self.edge!r}")
        for task in self.tasks if self.stem == "conv" else ():
            fitting = quarter(task) if task.dense else self.map_size()[:1] * 2
            if fitting != self.map_size():
                wanted = (
                    f"{fitting}, a quarter of the images of {task.name}" if task.dense else f"square for {task.name}"
                )
                raise ValueError(f"DagConfig: trunk_size must be {wanted}, got {self.trunk_size}")

    @property
    def graph(self) -> Graph:
        return Graph(self.states, self.flow, self.stages)

    def map_size(self, stage: int = 0) -> tuple[int, int]:
        """Height and width of the maps of a stage."""
        height, width = (self.trunk_size,) * 2 if isinstance(self.trunk_size, int) else self.trunk_size
        return -(-height // 2**stage), -(-width // 2**stage)

    def stage_channels(self, stage: int) -> int:
        """Channels of the states of a stage."""
        return self.channels * 2**stage

    @property
    def edge_parameters(self) -> int:
        """Convolution weights of one edge of the first stage."""
        return 9 * self.channels**2

    @property
    def edge_flops(self) -> int:
        """Twice the multiply-adds of one such edge's convolution for one image."""
        height, width = self.map_size()
        return 2 * self.edge_parameters * height * width

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DagConfig:
        """The config of :meth:`to_dict`'s output; ValueError for keys that are unknown or missing."""
        return from_dict(cls, dict(data), "DagConfig")


def quarter(task: Task) -> tuple[int, int]:
    """Height and width of the map that the stem of a dense task makes of its images."""
    _, height, width = task.shape
    return -(-height // 4), -(-width // 4)
