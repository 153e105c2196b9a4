"""A DAG network whose tasks keep different halves of the graph, and what it is timed against."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from den.dag import DagConfig, DagNetwork, SubNetwork, reduce
from den.nn.tasks import Task

from .harness import Case, Work

PER_TASK = 4
STATES, FLOW, RATIO = 8, 3, 0.5
IMAGE, CLASSES = 28, 25
DENSE = {"segmentation": 13, "depth": 1, "normals": 3}  # values of each pixel


@dataclass(frozen=True)
class MixedTasks:
    """A reduced network, the same network whole, and some images of each of its tasks."""

    network: DagNetwork
    whole: DagNetwork
    images: list[Tensor]
    tasks: list[str]

    @classmethod
    def make(cls, case: Case) -> MixedTasks:
        """The network of ``case``: its shape is "{channels}x{side}", its batch four images a task; or
        "{channels}x{height}x{width}", its batch images for the three tasks of NYU-v2, four times as high and wide."""
        channels, *sides = map(int, case.shape.split("x"))
        if len(sides) == 1:
            tasks = tuple(Task(f"task{k}", CLASSES, IMAGE, 1) for k in range(case.batch // PER_TASK))
        else:
            height, width = (4 * side for side in sides)
            tasks = tuple(Task(kind, values, height, 3, kind, width) for kind, values in DENSE.items())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size = sides[0] if len(sides) == 1 else (sides[0], sides[1])
            whole = DagNetwork(DagConfig(tasks, STATES, FLOW, channels, size)).eval()
            images = [torch.randn(case.batch // len(tasks), *task.shape) for task in tasks]
        if whole.tasks[0].dense:
            images = images[:1] * len(tasks)
        network = copy.deepcopy(whole)
        for k in range(len(tasks)):
            gates = network.gates.of_task(k)
            network.keep(k, reduce(network.graph, gates, RATIO, ranking="random", seed=k).kept)
        return cls(network, whole, images, [task.name for task in tasks])

    def together(self, network: DagNetwork, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Outputs of each task, all tasks in one batch; in another dtype by a copy of the network."""
        if dtype != torch.float32:
            network = copy.deepcopy(network).to(dtype)
        return network([part.to(dtype) for part in self.images], self.tasks)

    def extracted(self, network: DagNetwork) -> list[SubNetwork]:
        """Each task's network alone: ordinary convolutions, batch norms folded."""
        return [SubNetwork(network, task).eval() for task in self.tasks]

    def one_by_one(self, networks: list[SubNetwork]) -> list[Tensor]:
        """Outputs of each task, the tasks one after the other."""
        return [network(part) for network, part in zip(networks, self.images, strict=True)]

    def work(self) -> Work:
        """FLOPs of the batch as reduced and whole; the bytes are those of weights and states."""
        kept, config = [self.network.structure(k) for k in range(len(self.tasks))], self.network.config
        ends = sum(module.flops() for module in (*self.network.stems, *self.network.heads))
        edges = sum(sum(sub.edges) for sub in kept)
        flops, dense = (
            len(self.images[0]) * (ends + count * config.edge_flops)
            for count in (edges, len(kept) * len(self.network.edges))
        )
        height, width = config.map_size()
        states = 4 * sum(map(len, self.images)) * STATES * config.channels * height * width
        weights = 4 * sum(parameter.numel() for parameter in self.network.parameters())
        return Work(flops, dense, weights + 2 * states)


class HardShared(nn.Module):
    """The whole graph in ordinary convolutions, the same for all tasks: the best dense way to run a mixed batch."""

    def __init__(self, whole: DagNetwork) -> None:
        super().__init__()
        self.trunk, self.stems, self.heads = SubNetwork(whole, 0), whole.stems, whole.heads
        self.dense = whole.tasks[0].dense
        self.eval()

    def forward(self, images: list[Tensor]) -> list[Tensor]:  # [n, c, S, T] -> the outputs of each task
        x = torch.cat([stem(part) for stem, part in zip(self.stems, images, strict=True)])
        maps = self.trunk.trunk(x)
        rows = (maps if self.dense else maps.mean((2, 3))).split([len(part) for part in images])
        return [head(part) for head, part in zip(self.heads, rows, strict=True)]
