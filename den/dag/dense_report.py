"""Results of runs with dense tasks, and their gains over networks of a single task, as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from den.dag.kinds import relative_gains
from den.dag.scenarios import SINGLE_TASK
from den.dag.tables import markdown_table

if TYPE_CHECKING:
    from den.dag.report import RunReport

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
    """Of every run of several tasks, or of all where there is no such run: each metric beside that of a single-task
    network, and Delta.

    A run of one task among them is the single-task reference of that task (several: their mean); for tasks without
    one the published values stand, where there are any.
    """
    several = [run for run in runs if len(run.model.tasks) > 1]
    references = single_task_references(runs)
    return "\n\n".join(_delta_table(run, references) for run in several or runs)


def single_task_references(runs: Sequence[RunReport]) -> dict[tuple[str, str], Metrics]:
    """By scenario and task: what the runs of this task alone reach."""
    alone: dict[tuple[str, str], list[Metrics]] = {}
    for run in runs:
        if len(run.model.tasks) == 1:
            (task,) = run.model.tasks
            alone.setdefault((run.config.data.scenario, task.name), []).append(run.results[task.name].metrics)
    return {key: {name: statistics.mean(each[name] for each in found) for name in found[0]}
            for key, found in alone.items()}  # fmt: skip


def _delta_table(run: RunReport, references: dict[tuple[str, str], Metrics]) -> str:
    rows, deltas, published = [], {}, False
    scenario = run.config.data.scenario
    for task in run.model.tasks:
        results = run.results[task.name].metrics
        known = SINGLE_TASK.get(scenario, {}).get((task.name, task.classes), {})
        single = references.get((scenario, task.name), known) if len(run.model.tasks) > 1 else known
        gains = relative_gains(task.kind, results, single)
        for name, value in results.items():
            reference = value_text(name, single[name]) if name in single else ""
            gain = f"{100 * gains[name]:+.1f}" if name in gains else ""
            rows.append([f"{task.name}: {name}", value_text(name, value), reference, gain])
        if gains:
            deltas[task.name] = 100 * statistics.mean(gains.values())
            published |= single is known
    head = (run.title, "this run", "single task", "better by, %")
    return "\n\n".join([markdown_table(head, rows), *_delta_lines(deltas, published)])


def _delta_lines(deltas: dict[str, float], published: bool) -> list[str]:
    if not deltas:
        return []
    parts = ", ".join(f"{name} {value:+.1f}" for name, value in deltas.items())
    mean = statistics.mean(deltas.values())
    lines = [f"Delta, the mean over a task's metrics, in per cent: {parts}; over tasks {mean:+.1f}."]
    if published:
        lines.append(
            "Published single-task values (AdaShare protocol) are of another network, trained and measured at another"
            " size: train a task alone with `--mode hard --data.only TASK` and give its run to the report for a"
            " reference of the same kind."
        )
    return lines
