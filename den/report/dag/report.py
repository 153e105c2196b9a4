"""Results of runs of `den dag train`, as tables in Markdown."""

from collections.abc import Sequence
from pathlib import Path

import torch

from den.dag.config import DagReportConfig, DagTrainConfig
from den.dag.evaluate import deployed_parameters
from den.dag.gates import SPREAD_WARNING
from den.dag.scenarios import named_settings
from den.report.dag.comparison import comparison, reference, verdicts
from den.report.dag.dense import delta_tables
from den.report.dag.drawing import draw_graph
from den.report.dag.measured import RunReport, flat_settings, measured, shown, test_sets, timed_images
from den.runs.dag import open_run
from den.support.device import CPU, choose_device, machine_name
from den.support.files import check_file, check_folder, is_writable, write_text
from den.support.progress import progress
from den.support.tables import markdown_table


def main(settings: DagReportConfig) -> None:
    """Print the tables of `report`, and where the drawings are; ValueError and OSError for wrong input."""
    print(report(settings), end="")
    if settings.out is not None:
        print(f"den: the drawings are in {settings.out}")


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
    opened = [open_run(path) for path in settings.runs]
    kinds = dict.fromkeys(run.config.data for run in opened)
    loaded = {data: test_sets(data, settings.data_root, device) for data in kinds}
    for each in opened:
        each.model.to(device)
    found = [measured(each, loaded[each.config.data], settings.time) for each in progress(opened, "runs")]
    if any(run.dense for run in found):
        parts = [delta_tables(found)]
    else:
        parts = [] if len(found) == 1 else [comparison(found), verdicts(found)]
    for run in found:
        parts.append(f"### {run.label(reference(found))}, {run.training}\n\n{task_table(run)}\n\n{remarks(run)}")
    text = "\n\n".join(parts) + "\n"
    if settings.markdown is not None:
        write_text(settings.markdown, heading(found, opened[0].versions, device) + text)
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
    """Remarks on what a table does not show: sharing, and the spread of the gates."""
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
    given, default = flat_settings(config), flat_settings(named_settings(name))
    words = [f"den dag train {name}"]
    for name, value in given.items():
        if value != default[name] and name not in ("data.root", "progress"):
            text = f"runs/{Path(value).name}" if name in ("out", "start") else shown(value)
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)
