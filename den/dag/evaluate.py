"""What a DAG network reaches and what it costs, task by task."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from den.dag.extract import SubNetwork
from den.dag.graph import SubGraph
from den.dag.network import DagNetwork
from den.data.images import ImageSet

BATCH = 250


@dataclass(frozen=True)
class TaskResult:
    """Results of one task on a set."""

    task: str
    images: int
    accuracy: float  # 0..1
    loss: float  # mean cross-entropy


@dataclass(frozen=True)
class TaskCost:
    """What one task's sub-network is and costs."""

    task: str
    kept: SubGraph
    parameters: int  # of the extracted network, batch norms, stem and head included
    flops: int  # twice the multiply-adds of its convolutions and head, for one image
    spread: float  # standard deviation of its edge gates


def evaluate_tasks(model: DagNetwork, sets: Sequence[ImageSet], batch_size: int = BATCH) -> dict[str, TaskResult]:
    """Results of every set, by the name of its task; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return {image_set.name: _evaluate(model, image_set, batch_size) for image_set in sets}
    finally:
        model.train(training)


def _evaluate(model: DagNetwork, image_set: ImageSet, batch_size: int) -> TaskResult:
    correct, loss = 0, 0.0
    for start in range(0, len(image_set), batch_size):
        part = slice(start, start + batch_size)
        logits, labels = model(image_set.inputs(part), image_set.name), image_set.labels[part]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return TaskResult(image_set.name, len(image_set), correct / len(image_set), loss / len(image_set))


def task_costs(model: DagNetwork) -> list[TaskCost]:
    """Structure and cost of every task's sub-network."""
    spread = model.gates.spread().tolist()
    found = []
    for k, task in enumerate(model.tasks):
        alone = SubNetwork(model, k)
        flops = alone.stem.flops() + len(alone.edges) * model.config.edge_flops + alone.head.flops()
        found.append(TaskCost(task.name, alone.kept, alone.parameters_count, flops, spread[k]))
    return found


def deployed_parameters(model: DagNetwork) -> int:
    """Learned numbers of the network less the edges that no task keeps; gates are counted where they are kept."""
    modules = [*model.stems, *model.heads, *(model.edges[e] for e in model.used_edges())]
    weights = sum(parameter.numel() for module in modules for parameter in module.parameters())
    gates = sum(len(model.structure(k).items()) for k in range(len(model.tasks)))
    return weights + gates


@torch.inference_mode()
def time_tasks(model: DagNetwork, sets: Sequence[ImageSet], batch_size: int = 32, rounds: int = 9) -> dict[str, float]:
    """Seconds that a batch of each task takes in its extracted network: medians of interleaved rounds."""
    alone = {image_set.name: SubNetwork(model, image_set.name).eval() for image_set in sets}
    images = {image_set.name: image_set.inputs(slice(0, batch_size)) for image_set in sets}
    seconds: dict[str, list[float]] = {name: [] for name in alone}
    for _ in range(rounds + 1):
        for name, network in alone.items():
            start = time.perf_counter()
            network(images[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}
