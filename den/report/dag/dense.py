"""Results of runs with dense tasks, and their gains over networks of a single task, as tables in Markdown."""

import statistics
from collections.abc import Sequence

from den.dag.kinds import relative_gains
from den.dag.scenarios import SINGLE_TASK
from den.report.dag.measured import RunReport
from den.support.tables import markdown_table

UNITS = {"abs_error": "", "rel_error": "", "mean_angle": " deg", "median_angle": " deg"}  # the others are shares
Metrics = dict[str, float]


def value_text(name: str, value: float) -> str:
    """A metric as it is written: shares in per cent, errors with their unit.

    >>> value_text("miou", 0.275), value_text("mean_angle", 17.5), value_text("abs_error", 0.62)
    ('27.50%', '17.50 deg', '0.6200')
    """
    if name not in UNITS:
        return f"{value:.2%}"
    return f"{value:.2f}{UNITS[name]}" if UNITS[name] else f"{value:.4f}"


def delta_tables(runs: Sequence[RunReport]) -> str:
    """Tables of each metric beside that of a single-task network, with Delta, the mean of its relative gains.

    One table for each run that shares something between tasks (for every run, where none does); for several runs, first
    a table of their Deltas side by side.

    Runs of one task, and those of a network for each task, are the single-task references (several: their mean); for
    tasks without one the published values stand, where there are any.
    """
    shown = [run for run in runs if not _alone(run)] or runs
    references = single_task_references(runs)
    parts = [_delta_summary(shown, references)] if len(shown) > 1 else []
    return "\n\n".join([*parts, *(_delta_table(run, references) for run in shown)])


def single_task_references(runs: Sequence[RunReport]) -> dict[tuple[str, str], Metrics]:
    """Metrics of finished networks of one task alone, by scenario and task; of several, their mean."""
    alone: dict[tuple[str, str], list[Metrics]] = {}
    for run in runs:
        for task in run.model.tasks if _alone(run) and run.finished else ():
            alone.setdefault((run.config.data.scenario, task.name), []).append(run.results[task.name].metrics)
    return {key: {name: statistics.mean(each[name] for each in found) for name in found[0]}
            for key, found in alone.items()}  # fmt: skip


def task_references(run: RunReport, references: dict[tuple[str, str], Metrics]) -> dict[str, tuple[Metrics, bool]]:
    """Metrics that each task of a run is compared with; True where they are published values."""
    scenario, found = run.config.data.scenario, {}
    for task in run.model.tasks:
        own = references.get((scenario, task.name)) if not _alone(run) else None
        published = SINGLE_TASK[scenario](task) if scenario in SINGLE_TASK else {}
        found[task.name] = (published if own is None else own, own is None and bool(published))
    return found


def task_gains(run: RunReport, references: dict[tuple[str, str], Metrics]) -> dict[str, Metrics]:
    """Relative gains of the metrics of each task that has a reference, see `relative_gains`."""
    compared = task_references(run, references)
    gains = {
        task.name: relative_gains(task.kind, run.results[task.name].metrics, compared[task.name][0])
        for task in run.model.tasks
    }
    return {name: found for name, found in gains.items() if found}


def _delta_summary(runs: Sequence[RunReport], references: dict[tuple[str, str], Metrics]) -> str:
    names = list(dict.fromkeys(task.name for run in runs for task in run.model.tasks))
    rows = []
    for run in runs:
        deltas = {name: 100 * statistics.mean(gains.values()) for name, gains in task_gains(run, references).items()}
        cells = [f"{deltas[name]:+.1f}" if name in deltas else "" for name in names]
        mean = f"{statistics.mean(deltas.values()):+.1f}" if deltas else ""
        rows.append([_label(run), *cells, mean, f"{run.mean_flops / 1e6:.2f}"])
    head = ["network", *(f"Delta {name}, %" for name in names), "over tasks", "MFLOP, mean of tasks"]
    return markdown_table(head, rows)


def _delta_table(run: RunReport, references: dict[tuple[str, str], Metrics]) -> str:
    compared, gains, rows = task_references(run, references), task_gains(run, references), []
    for task in run.model.tasks:
        single, gained = compared[task.name][0], gains.get(task.name, {})
        for name, value in run.results[task.name].metrics.items():
            reference = value_text(name, single[name]) if name in single else ""
            gain = f"{100 * gained[name]:+.1f}" if name in gained else ""
            rows.append([f"{task.name}: {name}", value_text(name, value), reference, gain])
    table = markdown_table((_label(run), "this run", "single task", "better by, %"), rows)
    deltas = {name: 100 * statistics.mean(each.values()) for name, each in gains.items()}
    return "\n\n".join([table, *_delta_lines(deltas, any(compared[name][1] for name in gains))])


def _alone(run: RunReport) -> bool:
    return run.config.mode == "single" or len(run.model.tasks) == 1


def _label(run: RunReport) -> str:
    return f"{run.path.name}: {run.title}"


def _delta_lines(deltas: dict[str, float], published: bool) -> list[str]:
    if not deltas:
        return []
    parts = ", ".join(f"{name} {value:+.1f}" for name, value in deltas.items())
    mean = statistics.mean(deltas.values())
    lines = [f"Delta, the mean over a task's metrics, in per cent: {parts}; over tasks {mean:+.1f}."]
    if published:
        lines.append(
            "Published single-task values (AdaShare protocol) are of another network, trained and measured at another"
            " size: train a network for each task with `--mode single`, and give its run to the report, for references"
            " of the same kind."
        )
    return lines
