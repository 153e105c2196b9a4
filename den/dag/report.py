"""Results of runs of `den dag train`, as tables in Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from den.config import read_config
from den.dag.config import DagReportConfig, DagTrainConfig
from den.dag.drawing import draw_graph
from den.dag.engine import load_network
from den.dag.evaluate import TaskCost, TaskResult, deployed_parameters, evaluate_tasks, task_costs, time_tasks
from den.dag.gates import SPREAD_WARNING
from den.dag.network import DagNetwork
from den.dag.scenarios import load_tasks
from den.tables import markdown_table


@dataclass(frozen=True, eq=False)
class RunReport:
    """One run on its test sets."""

    path: Path
    config: DagTrainConfig
    model: DagNetwork
    results: dict[str, TaskResult]
    costs: list[TaskCost]
    seconds: dict[str, float]  # of a batch of 32 in each task's extracted network; empty where not measured

    @property
    def accuracy(self) -> float:
        """Mean over tasks, 0..1."""
        return statistics.mean(result.accuracy for result in self.results.values())

    @property
    def kind(self) -> str:
        """What the run is, in words."""
        if self.config.mode == "hard":
            return "hard sharing"
        reduction = self.config.reduction
        words = {"flow": "flow-based reduction", "gates": "raw-gate ranking", "random": "random reduction"}
        return words[reduction.ranking] + ("" if reduction.guard else ", no guard")

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.config.training.steps:,} updates, seed {self.config.seed}"

    @property
    def mean_flops(self) -> float:
        return statistics.mean(cost.flops for cost in self.costs)

    @property
    def topologies(self) -> int:
        """Different sub-graphs among the tasks."""
        return len({cost.kept for cost in self.costs})


def measure(path: Path, data_root: Path | None = None, time: bool = True) -> RunReport:
    """Evaluate the last checkpoint of a run on its test sets; ValueError where there is none."""
    config = read_config(DagTrainConfig, path / "config.json")
    model = load_network(path / "last.safetensors")
    sets = load_tasks(config.data, "test", data_root)
    seconds = time_tasks(model, sets) if time else {}
    return RunReport(path, config, model, evaluate_tasks(model, sets), task_costs(model), seconds)


def report(settings: DagReportConfig) -> str:
    """Measure the runs, draw each run's graph beside its checkpoint, write and return the tables."""
    found = [measure(path, settings.data_root, settings.time) for path in settings.runs]
    for run in found:
        draw_graph(run.model, run.path / "graph.png")
    parts = [] if len(found) == 1 else [comparison(found), verdicts(found)]
    parts += [f"### {run.title}\n\n{task_table(run)}\n\n{remarks(run)}" for run in found]
    text = "\n\n".join(parts) + "\n"
    if settings.markdown is not None:
        settings.markdown.parent.mkdir(parents=True, exist_ok=True)
        settings.markdown.write_text(heading(found) + text)
    return text


def task_table(run: RunReport) -> str:
    """A row per task: accuracy, topology and cost."""
    head = ("task", "classes", "test images", "accuracy", "depth", "width", "edges", "sparsity", "parameters", "MFLOP")
    rows = []
    for cost, task in zip(run.costs, run.model.tasks, strict=True):
        result, kept = run.results[task.name], cost.kept
        cells = [
            task.name, f"{task.classes}", f"{result.images}", f"{result.accuracy:.2%}", f"{kept.depth}",
            f"{kept.width}", f"{sum(kept.edges)}", f"{kept.sparsity:.2f}", f"{cost.parameters:,}",
            f"{cost.flops / 1e6:.2f}",
        ]  # fmt: skip
        if run.seconds:
            cells.append(f"{1e3 * run.seconds[task.name]:.1f}")
        rows.append(cells)
    return markdown_table([*head, *(["ms per 32 images"] if run.seconds else [])], rows)


def remarks(run: RunReport) -> str:
    """What a table does not show: sharing, and whether the gates say anything."""
    spread = [cost.spread for cost in run.costs]
    used = len(run.model.used_edges())
    lines = [
        f"{run.topologies} different topologies among {len(run.costs)} tasks; {used} of {len(run.model.graph.edges)}"
        f" edges in use, {deployed_parameters(run.model):,} parameters in all; mean accuracy {run.accuracy:.2%}."
    ]
    if run.config.mode == "dag":
        lines.append(f"Standard deviation of a task's edge gates: {min(spread):.3f} to {max(spread):.3f}.")
        if min(spread) < SPREAD_WARNING:
            lines.append(
                f"**Warning**: below {SPREAD_WARNING} the flow follows the position in the graph more than what was"
                " learned, and tasks tend to keep the same edges."
            )
    return " ".join(lines)


def comparison(runs: Sequence[RunReport]) -> str:
    """A row per kind of run and number of updates: means over its seeds, and what the first kind has above each, seed
    by seed, after as many updates."""
    groups: dict[tuple[str, int], dict[int, RunReport]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.config.training.steps), {})[run.config.seed] = run
    first = runs[0].kind
    rows = []
    for (kind, steps), group in groups.items():
        accuracy = [run.accuracy for run in group.values()]
        peers = groups.get((first, steps), {}) if kind != first else {}
        gains = [100 * (peers[seed].accuracy - run.accuracy) for seed, run in group.items() if seed in peers]
        rows.append([
            kind, f"{steps:,}", ", ".join(map(str, sorted(group))), f"{statistics.mean(accuracy):.2%}",
            f"{100 * statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "",
            ", ".join(f"{gain:+.2f}" for gain in gains),
            f"{statistics.mean(deployed_parameters(run.model) for run in group.values()):,.0f}",
            f"{statistics.mean(run.mean_flops for run in group.values()) / 1e6:.2f}",
            f"{statistics.mean(run.topologies for run in group.values()):.1f}",
        ])  # fmt: skip
    head = ("network", "updates", "seeds", "mean accuracy", "deviation, points", f"{first} better by, points",
            "parameters, all tasks", "MFLOP, mean of tasks", "topologies")  # fmt: skip
    return markdown_table(head, rows)


def verdicts(runs: Sequence[RunReport]) -> str:
    """Whether the first kind of run is at least as accurate as each of the others, after as many updates."""
    first, lines = runs[0].kind, ["What this is to show:", ""]
    for steps in dict.fromkeys(run.config.training.steps for run in runs):
        means = {
            kind: statistics.mean(
                run.accuracy for run in runs if run.kind == kind and run.config.training.steps == steps
            )
            for kind in dict.fromkeys(run.kind for run in runs if run.config.training.steps == steps)
        }
        for kind, accuracy in means.items():
            if kind != first and first in means:
                word = "yes" if means[first] >= accuracy else "**no**"
                lines.append(
                    f"- {word}: after {steps:,} updates {first} at least as accurate as {kind}:"
                    f" {means[first]:.2%} against {accuracy:.2%}"
                )
    return "\n".join(lines)


def heading(runs: Sequence[RunReport]) -> str:
    """Title, the commands that made the runs, versions."""
    first = runs[0]
    commands = "\n".join(command_of(run.config) for run in runs)
    versions = json.loads((first.path / "versions.json").read_text())
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch") if name in versions)
    return (
        f"# Networks over one graph, {first.config.data.scenario}\n\n"
        "Written by `den dag report`, from runs of these commands (and `--data.root FOLDER`):\n\n"
        f"```bash\n{commands}\n```\n\nOn a CPU; {used}. Accuracy on the test split after the last update; nothing was"
        " chosen by it. Mean accuracy is over tasks.\n\n"
    )


def command_of(config: DagTrainConfig) -> str:
    """The command line that makes a run with these settings."""
    given, default, words = _flat(config), _flat(DagTrainConfig()), ["den dag train"]
    for name, value in given.items():
        if value != default[name] and name not in ("data.root", "progress"):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            shown = f"runs/{Path(value).name}" if name in ("out", "start") else shown
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def _flat(config: object, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in vars(config).items():
        nested = hasattr(value, "__dataclass_fields__")
        flat.update(_flat(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat
