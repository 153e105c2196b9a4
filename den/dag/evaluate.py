"""Results and cost of a DAG network, task by task."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from den.dag.extract import SubNetwork, alone, plain_edge
from den.dag.graph import SubGraph
from den.dag.head import head_flops
from den.dag.kinds import KINDS
from den.dag.network import DagNetwork
from den.dag.peers import CrossStitchNetwork, PeerNetwork, SeparateNetworks
from den.data import ImageSet, SceneSet
from den.data.images import Example
from den.data.loaders import LoaderSet
from den.support import ranks
from den.support.device import wait_for

BATCH, DENSE_BATCH = 250, 8


@dataclass(frozen=True)
class TaskResult:
    """Results of one task on a set."""

    task: str
    images: int
    loss: float  # of the batches, a mean over images
    metrics: dict[str, float]  # see `den.dag.kinds`

    @property
    def accuracy(self) -> float:
        """Accuracy of a classification task, 0..1."""
        return self.metrics["accuracy"]


@dataclass(frozen=True)
class TaskCost:
    """Structure and cost of one task's sub-network."""

    task: str
    kept: SubGraph
    parameters: int  # of the extracted network, batch norms, stem and head included
    flops: int  # twice the multiply-adds of its convolutions and head, for one image
    spread: float  # standard deviation of its edge gates


def evaluate_tasks(
    model: DagNetwork | PeerNetwork,
    sets: Sequence[ImageSet | SceneSet | LoaderSet],
    batch_size: int = BATCH,
    *,
    shared: bool = False,
) -> dict[str, TaskResult]:
    """Results of every task of the sets, by its name; the model's mode is as before afterwards.

    The sets' batches lie on the model's device, see their ``to``.  shared: the processes of a run, all of which call
    this, take the batches in turns, and get the same results.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            found = [_evaluate(model, each, batch_size, shared) for each in sets]
            return {name: result for each in found for name, result in each.items()}
    finally:
        model.train(training)


def _evaluate(
    model: DagNetwork | PeerNetwork, image_set: ImageSet | SceneSet | LoaderSet, batch_size: int, shared: bool
) -> dict[str, TaskResult]:
    """Results of all tasks of one set, by name; each batch runs them together."""
    tasks, count = image_set.tasks, 0
    found: list[list[float]] = []  # of each batch: the sums of the tasks' losses
    metrics = {task.name: KINDS[task.kind].metrics(task) for task in tasks}
    for examples in _batches(image_set, batch_size, shared):
        names, images, targets = zip(*examples, strict=True)
        count += len(images[0])
        found.append([])
        for task, output, target in zip(tasks, model(images, names), targets, strict=True):
            found[-1].append(KINDS[task.kind].loss(output, target).item() * len(target))
            metrics[task.name].add(output, target)
    if shared:
        found, (metrics, *others) = ranks.in_turns(found), ranks.gathered(metrics)
        count = sum(ranks.gathered(count))
        for other, name in itertools.product(others, metrics):
            metrics[name].take_in(other[name])
    losses = {task.name: sum(each) for task, each in zip(tasks, zip(*found, strict=True), strict=True)}
    for task in tasks:
        if not metrics[task.name].count:
            raise ValueError(f"evaluate: {task.name} must have a target in the set, got none in {count} images")
    return {name: TaskResult(name, count, losses[name] / count, metrics[name].results()) for name in losses}


def _batches(
    image_set: ImageSet | SceneSet | LoaderSet, batch_size: int, shared: bool = False
) -> Iterator[list[Example]]:
    """Batches of a set in its order, once through; a loader's as it makes them.

    shared: those batches of a set in memory whose turn it is in this process.
    """
    if isinstance(image_set, LoaderSet):
        yield from image_set.batches()
        return
    step = min(batch_size, DENSE_BATCH) if any(task.dense for task in image_set.tasks) else batch_size
    starts = range(0, len(image_set), step)
    for start in starts[ranks.rank() :: ranks.count()] if shared else starts:
        yield image_set.examples(slice(start, start + step))


def task_costs(model: DagNetwork | PeerNetwork) -> list[TaskCost]:
    """Structure and cost of every task's sub-network."""
    if isinstance(model, SeparateNetworks):
        return [cost for network in model.networks for cost in task_costs(network)]
    spread = model.gates.spread().tolist()
    if isinstance(model, CrossStitchNetwork):
        count, kept = deployed_parameters(model), model.graph.whole()
        return [TaskCost(t.name, kept, count, model.flops(k), spread[k]) for k, t in enumerate(model.tasks)]
    found = []
    for k, task in enumerate(model.tasks):
        network = SubNetwork(cast(DagNetwork, model), k)
        flops = network.stem.flops() + head_flops(network.head, task, model.config) + network.trunk_flops()
        found.append(TaskCost(task.name, network.kept, network.parameters_count, flops, spread[k]))
    return found


def deployed_parameters(model: DagNetwork | PeerNetwork) -> int:
    """Learned numbers of the network less the edges, and channel groups of edges, that no task keeps; gates are counted
    where they are kept."""
    if isinstance(model, PeerNetwork):
        return sum(p.numel() for name, p in model.named_parameters() if "gates." not in name)
    levels = model.gates.edge_levels.amax(0).tolist()  # the most that a task uses of each edge
    modules = [*model.stems, *model.heads, *(plain_edge(model, e, levels[e]) for e in model.used_edges())]
    ends = [end for stage in model.stages for end in (stage.read_in, stage.read_out)]
    used = model.gates.block_levels().any(0)[len(model.edges) :].tolist()
    modules += [end for end, kept in zip(ends, used, strict=True) if kept]
    weights = sum(parameter.numel() for module in modules for parameter in module.parameters())
    gates = sum(len(model.structure(k).items()) for k in range(len(model.tasks)))
    return weights + gates


def time_tasks(
    model: DagNetwork | PeerNetwork, sets: Sequence[ImageSet | SceneSet], batch_size: int = 32, rounds: int = 9
) -> dict[str, float]:
    """Seconds that a batch of each task takes in its extracted network: medians of interleaved rounds."""
    with torch.inference_mode():
        examples = [example for each in sets for example in each.examples(slice(0, batch_size))]
        images = {name: part for name, part, _ in examples}
        networks = {name: _alone(model, name) for name in images}
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(rounds + 1):
            for name, network in networks.items():
                wait_for(images[name].device)
                start = time.perf_counter()
                network(images[name])
                wait_for(images[name].device)
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def _alone(model: DagNetwork | PeerNetwork, task: str) -> Callable[[Tensor], Tensor]:
    """The smallest network that runs one task: its sub-network; the whole of a cross-stitch network, which has none."""
    return partial(model, task=task) if isinstance(model, CrossStitchNetwork) else alone(model, task)
