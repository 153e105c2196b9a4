"""A run of `den dag train`, measured on its test sets."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from den.dag.config import DagDataConfig, DagTrainConfig
from den.dag.evaluate import TaskCost, TaskResult, evaluate_tasks, task_costs, time_tasks
from den.dag.scenarios import load_tasks
from den.data import ImageSet, SceneSet
from den.recipes.dag.recipe import Network
from den.report.evidence import above_chance
from den.runs.dag import OpenedRun, open_run
from den.runs.state import Training
from den.support.device import choose_device
from den.support.settings import flattened

PEERS = {
    "hard": "hard sharing",
    "single": "single-task networks",
    "adashare": "AdaShare",
    "cross-stitch": "Cross-stitch",
}

# Settings that the tables show by other means, or that change no result.
TOLD = {
    "out", "start", "seed", "mode", "epoch_steps", "progress", "data.root", "training.steps", "reduction.ranking",
    "reduction.rerank", "reduction.guard", "device",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class RunReport:
    """Run of a DAG network, measured on its test sets."""

    path: Path
    config: DagTrainConfig
    model: Network
    results: dict[str, TaskResult]
    costs: list[TaskCost]
    seconds: dict[str, float]  # of a batch in each task's extracted network; empty where not measured
    state: Training | None = None  # how far the run has come; None: not known
    chance: dict[str, float] = field(default_factory=dict)  # share of the most frequent class, by task

    @property
    def dense(self) -> bool:
        """True where at least one task is measured otherwise than by its accuracy."""
        return any(task.kind != "classification" for task in self.model.tasks)

    @property
    def finished(self) -> bool:
        """True unless the run is known to be unfinished; only then conclusions are drawn from it."""
        return self.state is None or self.state.finished

    @property
    def accuracy(self) -> float:
        """Mean over classification tasks, 0..1."""
        return statistics.mean(result.accuracy for result in self.results.values())

    @property
    def trained(self) -> bool:
        """True unless the accuracy of a task is not clearly above chance."""
        tried = ((self.results[name], chance) for name, chance in self.chance.items())
        return all(above_chance(result.accuracy, chance, result.images) for result, chance in tried)

    @property
    def kind(self) -> str:
        """Name of the method, as a report prints it."""
        if self.config.mode in PEERS:
            return PEERS[self.config.mode]
        reduction = self.config.reduction
        words = {"flow": "flow-based reduction", "gates": "raw-gate ranking", "random": "random reduction"}
        return words[reduction.ranking] + (", reranked" * reduction.rerank) + ("" if reduction.guard else ", no guard")

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.training}"

    @property
    def training(self) -> str:
        updates = self.state.words if self.state and not self.finished else f"{self.updates} updates"
        return f"{updates}, seed {self.config.seed}"

    @property
    def updates(self) -> str:
        """Number of updates, such as "4,000"; of an unfinished run "40 of 4,000"."""
        steps = f"{self.config.training.steps:,}"
        return f"{self.state.updates:,} of {steps}" if self.state and not self.finished else steps

    def label(self, first: RunReport) -> str:
        """Name of the method, and the settings that differ from those of the first run."""
        own, others = flat_settings(self.config), flat_settings(first.config)
        changed = [f"{name.split('.')[-1].replace('_', ' ')} {shown(value)}" for name, value in own.items()
                   if value != others[name] and name not in TOLD]  # fmt: skip
        return ", ".join([self.kind, *changed])

    @property
    def mean_flops(self) -> float:
        return statistics.mean(cost.flops for cost in self.costs)

    @property
    def mean_seconds(self) -> float:
        """Seconds for a batch of one task, the mean over the tasks."""
        return statistics.mean(self.seconds.values())

    @property
    def topologies(self) -> int:
        """Different sub-graphs among the tasks."""
        return len({cost.kept for cost in self.costs})


def measure(path: Path, data_root: Path | None = None, time: bool = True, device: str = "auto") -> RunReport:
    """Evaluate the last checkpoint of a run on its test sets; ValueError where there is none, or no such device."""
    place = choose_device(device)
    run = open_run(path)
    run.model.to(place)
    return measured(run, test_sets(run.config.data, data_root, place), time)


def test_sets(data: DagDataConfig, root: Path | None, device: torch.device) -> list[ImageSet | SceneSet]:
    """The test sets of a run's tasks on a device; `root`: their folder, None: where the run had them."""
    return [each.to(device) for each in load_tasks(data, "test", root)]


def measured(run: OpenedRun, sets: list[ImageSet | SceneSet], time: bool) -> RunReport:
    """A run evaluated on its test sets, which lie on its network's device."""
    seconds = time_tasks(run.model, sets, timed_images(run.model)) if time else {}
    results, costs = evaluate_tasks(run.model, sets), task_costs(run.model)
    chance = {each.name: each.labels.bincount().max().item() / len(each) for each in sets if isinstance(each, ImageSet)}
    return RunReport(run.path, run.config, run.model, results, costs, seconds, run.state, chance)


def timed_images(model: Network) -> int:
    """Images of a batch that is timed."""
    return 4 if any(task.dense for task in model.tasks) else 32


def flat_settings(config: DagTrainConfig) -> dict[str, Any]:
    """The settings by dotted names."""
    return flattened(dataclasses.asdict(config))


def shown(value: object) -> str:
    """A setting as the command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
