"""Results of runs of `den dag train`, as tables in Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from den.config import read_config
from den.dag.config import DagReportConfig, DagTrainConfig
from den.dag.dense_report import delta_tables
from den.dag.drawing import draw_graph
from den.dag.engine import load_network
from den.dag.evaluate import TaskCost, TaskResult, deployed_parameters, evaluate_tasks, task_costs, time_tasks
from den.dag.gates import SPREAD_WARNING
from den.dag.network import DagNetwork
from den.dag.scenarios import load_tasks, named_settings
from den.tables import markdown_table

PEERS = {
    "hard": "hard sharing",
    "single": "single-task networks",
    "adashare": "AdaShare",
    "cross-stitch": "Cross-stitch",
}


# Settings that the tables show by other means, or that change no result.
TOLD = {
    "out", "start", "seed", "mode", "epoch_steps", "progress", "data.root", "training.steps", "reduction.ranking",
    "reduction.guard",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class RunReport:
    """One run on its test sets."""

    path: Path
    config: DagTrainConfig
    model: DagNetwork
    results: dict[str, TaskResult]
    costs: list[TaskCost]
    seconds: dict[str, float]  # of a batch in each task's extracted network; empty where not measured

    @property
    def dense(self) -> bool:
        """Whether a task is dense."""
        return any(task.dense for task in self.model.tasks)

    @property
    def accuracy(self) -> float:
        """Mean over classification tasks, 0..1."""
        return statistics.mean(result.accuracy for result in self.results.values())

    @property
    def kind(self) -> str:
        """What the run is, in words."""
        if self.config.mode in PEERS:
            return PEERS[self.config.mode]
        reduction = self.config.reduction
        words = {"flow": "flow-based reduction", "gates": "raw-gate ranking", "random": "random reduction"}
        return words[reduction.ranking] + ("" if reduction.guard else ", no guard")

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.training}"

    @property
    def training(self) -> str:
        return f"{self.config.training.steps:,} updates, seed {self.config.seed}"

    def label(self, first: RunReport) -> str:
        """What the run is, and which of its settings are not those of the first run."""
        own, others = _flat(self.config), _flat(first.config)
        changed = [f"{name.split('.')[-1].replace('_', ' ')} {_shown(value)}" for name, value in own.items()
                   if value != others[name] and name not in TOLD]  # fmt: skip
        return ", ".join([self.kind, *changed])

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
    seconds = time_tasks(model, sets, timed_images(model)) if time else {}
    return RunReport(path, config, model, evaluate_tasks(model, sets), task_costs(model), seconds)


def report(settings: DagReportConfig) -> str:
    """Measure the runs, draw each run's graph beside its checkpoint, write and return the tables."""
    found = [measure(path, settings.data_root, settings.time) for path in settings.runs]
    for run in found:
        draw_graph(run.model, run.path / "graph.png")
    if any(run.dense for run in found):
        parts = [delta_tables(found)]
    else:
        parts = [] if len(found) == 1 else [comparison(found), verdicts(found)]
    for run in found:
        parts.append(f"### {run.label(found[0])}, {run.training}\n\n{task_table(run)}\n\n{remarks(run)}")
    text = "\n\n".join(parts) + "\n"
    if settings.markdown is not None:
        settings.markdown.parent.mkdir(parents=True, exist_ok=True)
        settings.markdown.write_text(heading(found) + text)
    return text


def task_table(run: RunReport) -> str:
    """A row per task: accuracy (with dense tasks another table has the results), topology and cost."""
    measured = () if run.dense else ("accuracy",)
    head = ("task", "classes", "test images", *measured, "depth", "width", "edges", "sparsity", "parameters", "MFLOP")
    rows = []
    for cost, task in zip(run.costs, run.model.tasks, strict=True):
        result, kept = run.results[task.name], cost.kept
        cells = [
            task.name, f"{task.classes}", f"{result.images}",
            *([] if run.dense else [f"{result.accuracy:.2%}"]), f"{kept.depth}",
            f"{kept.width}", f"{sum(kept.edges)}", f"{kept.sparsity:.2f}", f"{cost.parameters:,}",
            f"{cost.flops / 1e6:.2f}",
        ]  # fmt: skip
        if run.seconds:
            cells.append(f"{1e3 * run.seconds[task.name]:.1f}")
        rows.append(cells)
    timed = [f"ms per {timed_images(run.model)} images"] if run.seconds else []
    return markdown_table([*head, *timed], rows)


def remarks(run: RunReport) -> str:
    """What a table does not show: sharing, and whether the gates say anything."""
    spread = [cost.spread for cost in run.costs]
    used = len(run.model.used_edges())
    lines = [
        f"{run.topologies} different topologies among {len(run.costs)} tasks; {used} of {len(run.model.graph.edges)}"
        f" edges in use, {deployed_parameters(run.model):,} parameters in all"
        + ("." if run.dense else f"; mean accuracy {run.accuracy:.2%}.")
    ]
    if run.config.mode == "dag":
        lines.append(f"Standard deviation of a task's edge gates: {min(spread):.3f} to {max(spread):.3f}.")
        if min(spread) < SPREAD_WARNING:
            lines.append(
                f"**Warning**: below {SPREAD_WARNING} the flow follows the position in the graph more than what was"
                " learned, and tasks tend to keep the same edges."
            )
    return " ".join(lines)


def timed_images(model: DagNetwork) -> int:
    """Images of a batch that is timed."""
    return 4 if any(task.dense for task in model.tasks) else 32


def comparison(runs: Sequence[RunReport]) -> str:
    """A row per kind of run and number of updates: means over its seeds, and what the first kind has above each, seed
    by seed, after as many updates."""
    groups: dict[tuple[str, int], dict[int, RunReport]] = {}
    for run in runs:
        groups.setdefault((run.label(runs[0]), run.config.training.steps), {})[run.config.seed] = run
    first = runs[0].kind
    rows = []
    for (label, steps), group in groups.items():
        accuracy = [run.accuracy for run in group.values()]
        peers = groups.get((first, steps), {}) if label != first else {}
        gains = [100 * (peers[seed].accuracy - run.accuracy) for seed, run in group.items() if seed in peers]
        of_task = [statistics.mean(cost.parameters for cost in run.costs) for run in group.values()]
        rows.append([
            label, f"{steps:,}", ", ".join(map(str, sorted(group))), f"{statistics.mean(accuracy):.2%}",
            f"{100 * statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "",
            ", ".join(f"{gain:+.2f}" for gain in gains),
            f"{statistics.mean(deployed_parameters(run.model) for run in group.values()):,.0f}",
            f"{statistics.mean(of_task):,.0f}",
            f"{statistics.mean(run.mean_flops for run in group.values()) / 1e6:.2f}",
            f"{statistics.mean(run.topologies for run in group.values()):.1f}",
        ])  # fmt: skip
    head = ("network", "updates", "seeds", "mean accuracy", "deviation, points", f"{first} better by, points",
            "parameters, all tasks", "parameters, one task", "MFLOP, one task", "topologies")  # fmt: skip
    return markdown_table(head, rows)


def verdicts(runs: Sequence[RunReport]) -> str:
    """Whether the first kind of run is at least as accurate as each of the others, after as many updates; over the
    seeds that both have."""
    accuracy: dict[tuple[str, int], dict[int, float]] = {}
    for run in runs:
        accuracy.setdefault((run.label(runs[0]), run.config.training.steps), {})[run.config.seed] = run.accuracy
    first, lines = runs[0].kind, ["What this is to show:", ""]
    for (label, steps), theirs in accuracy.items():
        seeds = sorted(set(theirs) & set(accuracy.get((first, steps), {})))
        if label == first or not seeds:
            continue
        ours, other = (statistics.mean(each[seed] for seed in seeds) for each in (accuracy[first, steps], theirs))
        lines.append(
            f"- {'yes' if ours >= other else '**no**'}: after {steps:,} updates {first} at least as accurate as"
            f" {label}: {ours:.2%} against {other:.2%} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        )
    return "\n".join(lines)


def heading(runs: Sequence[RunReport]) -> str:
    """Title, the commands that made the runs, versions."""
    first = runs[0]
    measured = "Measured" if first.dense else "Accuracy"
    commands = "\n".join(command_of(run.config) for run in runs)
    versions = json.loads((first.path / "versions.json").read_text())
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch") if name in versions)
    return (
        f"# Networks over one graph, {first.config.data.scenario}\n\n"
        "Written by `den dag report`, from runs of these commands (and `--data.root FOLDER`):\n\n"
        f"```bash\n{commands}\n```\n\nOn a CPU; {used}. {measured} on the test split after the last update; nothing"
        " was chosen by it." + ("" if first.dense else " Mean accuracy is over tasks.") + "\n\n"
    )


def command_of(config: DagTrainConfig) -> str:
    """The command line that makes a run with these settings."""
    name = f"dag-{config.data.scenario}"
    given, default, words = _flat(config), _flat(named_settings(name)), [f"den dag train {name}"]
    for name, value in given.items():
        if value != default[name] and name not in ("data.root", "progress"):
            shown = f"runs/{Path(value).name}" if name in ("out", "start") else _shown(value)
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flat(config: object, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in vars(config).items():
        nested = hasattr(value, "__dataclass_fields__")
        flat.update(_flat(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat
