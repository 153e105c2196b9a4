"""Results of runs of `den dag train`, as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from den.dag.comparison import comparison, reference, verdicts
from den.dag.config import DagDataConfig, DagReportConfig, DagTrainConfig
from den.dag.dense_report import delta_tables
from den.dag.drawing import draw_graph
from den.dag.evaluate import TaskCost, TaskResult, deployed_parameters, evaluate_tasks, task_costs, time_tasks
from den.dag.gates import SPREAD_WARNING
from den.dag.network import DagNetwork
from den.dag.runs import OpenedRun, open_run
from den.dag.scenarios import load_tasks, named_settings
from den.data import ImageSet, SceneSet
from den.runs.state import Training
from den.support.device import CPU, choose_device, machine_name
from den.support.files import check_file, check_folder, is_writable, write_text
from den.support.progress import progress
from den.support.tables import markdown_table

PEERS = {
    "hard": "hard sharing",
    "single": "single-task networks",
    "adashare": "AdaShare",
    "cross-stitch": "Cross-stitch",
}


# Settings that the tables show by other means, or that change no result.
TOLD = {
    "out", "start", "seed", "mode", "epoch_steps", "progress", "data.root", "training.steps", "reduction.ranking",
    "reduction.guard", "device",
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
    state: Training | None = None  # how far the run has come; None: not known

    @property
    def dense(self) -> bool:
        """Whether a task is dense."""
        return any(task.dense for task in self.model.tasks)

    @property
    def finished(self) -> bool:
        """Whether something can be concluded from it."""
        return self.state is None or self.state.finished

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
        updates = f"{self.updates} updates" if self.finished else self.state.words
        return f"{updates}, seed {self.config.seed}"

    @property
    def updates(self) -> str:
        """Those of the whole run, "4,000"; of an unfinished one those done too: "40 of 4,000"."""
        steps = f"{self.config.training.steps:,}"
        return steps if self.finished else f"{self.state.updates:,} of {steps}"

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


def measure(path: Path, data_root: Path | None = None, time: bool = True, device: str = "auto") -> RunReport:
    """Evaluate the last checkpoint of a run on its test sets; ValueError where there is none, or no such device."""
    place = choose_device(device)
    run = open_run(path)
    run.model.to(place)
    return measured(run, [each.to(place) for each in load_tasks(run.config.data, "test", data_root)], time)


def measured(run: OpenedRun, sets: list[ImageSet | SceneSet], time: bool) -> RunReport:
    """A run evaluated on its test sets, which lie on its network's device."""
    seconds = time_tasks(run.model, sets, timed_images(run.model)) if time else {}
    results, costs = evaluate_tasks(run.model, sets), task_costs(run.model)
    return RunReport(run.path, run.config, run.model, results, costs, seconds, run.state)


def report(settings: DagReportConfig) -> str:
    """Measure the runs, draw each run's graph beside its checkpoint, write and return the tables.

    Raises ValueError, before anything is measured, for a run, images, a device or a place to write that are missing.
    """
    device = choose_device(settings.device)
    if not settings.runs:
        raise ValueError("dag report: runs must be at least one run folder, got none")
    drawings = drawing_places(settings.runs, settings.out)
    if settings.markdown is not None:
        check_file(settings.markdown, "dag report: markdown")
    runs = [open_run(path) for path in settings.runs]
    loaded: dict[DagDataConfig, list[ImageSet | SceneSet]] = {}
    for data in dict.fromkeys(run.config.data for run in runs):
        loaded[data] = [each.to(device) for each in load_tasks(data, "test", settings.data_root)]
    for run in runs:
        run.model.to(device)
    found = [measured(run, loaded[run.config.data], settings.time) for run in progress(runs, "runs")]
    if any(run.dense for run in found):
        parts = [delta_tables(found)]
    else:
        parts = [] if len(found) == 1 else [comparison(found), verdicts(found)]
    for run in found:
        parts.append(f"### {run.label(reference(found))}, {run.training}\n\n{task_table(run)}\n\n{remarks(run)}")
    text = "\n\n".join(parts) + "\n"
    if settings.markdown is not None:
        write_text(settings.markdown, heading(found, runs[0].versions, device) + text)
    for run in found:
        draw_graph(run.model, drawings[run.path])
    return text


def drawing_places(runs: Sequence[Path], out: Path | None) -> dict[Path, Path]:
    """The file of each run's drawing: graph.png in its folder, or one of its name in `out`.

    Raises:
        ValueError: a folder that cannot be written to, or two runs of the same name with `out`.
    """
    if out is None:
        for run in runs:
            if run.is_dir() and not is_writable(run):
                raise ValueError(
                    f"dag report: run folder must be writable for its graph.png, got {run};"
                    " draw elsewhere with --out FOLDER"
                )
        return {run: run / "graph.png" for run in runs}
    places = {run: out / f"{run.resolve().name}-graph.png" for run in runs}
    if len(set(places.values())) < len(places):
        given = ", ".join(map(str, runs))
        raise ValueError(f"dag report: runs must have different names to be drawn in {out}, got {given}")
    check_folder(out, "dag report: out")
    return places


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


def heading(runs: Sequence[RunReport], versions: dict[str, str], device: torch.device = CPU) -> str:
    """Title, the commands that made the runs, where they are measured, versions."""
    first = runs[0]
    measured = "Measured" if first.dense else "Accuracy"
    commands = "\n".join(command_of(run.config) for run in runs)
    known = [f"{name} {versions[name]}" for name in ("python", "torch") if name in versions]
    used = ", ".join(known or ["versions unknown"])
    place = "a CPU" if device.type == "cpu" else machine_name(device)
    return (
        f"# Networks over one graph, {first.config.data.scenario}\n\n"
        "Written by `den dag report`, from runs of these commands (and `--data.root FOLDER`):\n\n"
        f"```bash\n{commands}\n```\n\nOn {place}; {used}. {measured} on the test split after the last update; nothing"
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
