"""Accuracy against what it costs: all methods of a section, and sweeps of one setting (figure 5 of the paper)."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from den.report.evidence import Interval, paired
from den.report.figures.style import DEN, DENSE, headline, shared_legend, styled
from den.report.groups import Group, Row, Section, Stat
from den.report.paper import MEAN
from den.runs.evaluation import Evaluation

MARKERS = "ovD^PXh<>p"
SHADES = (DEN, "#7d1128", "#f08a9b", "#b5179e", "#ff6b35", "#5c2a9d")  # of the networks that choose
NAMES = {
    "network.levels": "number of levels",
    "selector.rho": "rho",
    "estimator.initial": "initial distribution",
    "selector.baseline": "baseline of REINFORCE",
    "selector.exploration": "exploration",
}


@styled
def accuracy_against(section: Section, cost: str, points: Sequence[Evaluation] = ()) -> Figure:
    """Accuracy of every method against its cost, "flops" or "ms" per image, a panel for each task.

    points: operating points at run time of the section's runs, drawn hollow.
    """
    tasks = section.tasks
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(7.0, 5.2 * columns), 4.0 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        _panel(axes, section, task, cost, points)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    shared_legend(figure, panels[0])
    headline(figure, _finding(section, cost))
    return figure


def _cost(row: Row, task: str, cost: str) -> Stat | None:
    if cost == "flops":
        return row.stat("flops", task)
    return row.timing("dense" if row.method == "dense" else "selected", task)


def _panel(axes: Axes, section: Section, task: str, cost: str, points: Sequence[Evaluation]) -> None:
    unit = 1e-6 if cost == "flops" else 1e3
    for k, row in enumerate(section.rows):
        spent = _cost(row, task, cost) if task in row.tasks else None
        if spent is not None:
            accuracy, size = row.stat("accuracy", task), 110 if row.method == "den" else 55
            colour, marker = _look(section, k)
            axes.errorbar(
                unit * spent.mean, 100 * accuracy.mean, xerr=unit * (spent.deviation or 0),
                yerr=100 * (accuracy.deviation or 0), color=colour, lw=1, zorder=2,
            )  # fmt: skip
            axes.scatter(
                unit * spent.mean, 100 * accuracy.mean, s=size, color=colour, marker=marker, zorder=3, label=row.label
            )
    extra = [(p, r) for p in points for r in p.tasks if r.task == task and (cost == "flops" or r.timing)]
    if extra:
        costs = [unit * (r.timing.selected if cost != "flops" and r.timing else r.flops) for _, r in extra]
        axes.scatter(costs, [100 * r.accuracy for _, r in extra], s=60, facecolors="none", edgecolors=DEN, marker="*",
                     zorder=2, label="DEN, steered to a budget at run time")  # fmt: skip
    axes.set(
        xlabel="MFLOP per image (mean)" if cost == "flops" else "ms per image", ylabel="test accuracy in %", title=task
    )
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)


def _look(section: Section, index: int) -> tuple[str | tuple[float, ...], str]:
    """Colour and marker of a row: a star for a network that chooses, a square for dense."""
    row = section.rows[index]
    if row.method == "dense":
        return DENSE, "s"
    if row.method == "den":
        before = sum(other.method == "den" for other in section.rows[:index])
        return SHADES[before % len(SHADES)], "*"
    return matplotlib.colormaps["tab10"](index % 10), MARKERS[index % len(MARKERS)]


def _finding(section: Section, cost: str) -> str:
    """Sentence on what the most accurate network that chooses saves and loses against the dense one."""
    rows = [row for row in section.finished if row.method == "den"]
    dense, row = section.dense, max(rows, key=lambda row: row.stat("accuracy", MEAN).mean, default=None)
    what, less = ("FLOPs", "fewer FLOPs") if cost == "flops" else ("time", "as fast")
    title = f"{section.title}\nAccuracy against {what}"
    if row is None or dense is None:
        return title
    shared = [task for task in row.tasks if task in dense.tasks]
    if cost == "flops":
        saved = [1 / max(row.stat("flops_ratio", task).mean, 1e-9) for task in shared]
    else:
        timings = [row.timing("speedup", task) for task in shared]
        saved = [] if None in timings else [stat.mean for stat in timings if stat]
    if not saved:
        return title
    change = sum(row.stat("accuracy", t).mean - dense.stat("accuracy", t).mean for t in shared) / len(shared)
    words = f"{sum(saved) / len(saved):.1f} times {less}, {100 * change:+.1f} points against dense"
    return f"{section.title}\n{row.label}: {words}"


@styled
def sweep(name: str, groups: Sequence[Group]) -> Figure:
    """Accuracy and FLOPs of networks that differ in one setting (figure 5 of the paper), a panel for each task."""
    tasks = groups[0].tasks
    figure = Figure(figsize=(4.8 * len(tasks), 4.0), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        marks = []
        for group in groups:
            ratio = Stat.of(r.flops_ratio for r in group.results(task))
            accuracy = Stat.of(r.accuracy for r in group.results(task))
            marks.append((ratio.mean, 100 * accuracy.mean))
            axes.errorbar(
                *marks[-1], xerr=ratio.deviation or 0, yerr=100 * (accuracy.deviation or 0), color=DEN, fmt="o"
            )
            axes.annotate(f"{setting(group, name)}", marks[-1], xytext=(7, 5), textcoords="offset points")
        axes.plot(*zip(*marks, strict=True), color=DEN, lw=0.8, alpha=0.5, zorder=1)
        axes.set(xlabel="FLOPs over those of the full structure", ylabel="test accuracy in %", title=task)
        axes.margins(0.2)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    headline(figure, f"{NAMES.get(name, name)}:\n{_most_accurate(name, groups)}")
    return figure


def _most_accurate(name: str, groups: Sequence[Group]) -> str:
    """The setting that is the most accurate, if its seeds show it against every other."""
    by_seed = [{record.seed: record.accuracy for record in group.records} for group in groups]
    best = max(range(len(groups)), key=lambda k: fmean(by_seed[k].values()))
    shown = all(Interval.of(paired(by_seed[best], other)).above() for k, other in enumerate(by_seed) if k != best)
    words = "is the most accurate" if shown else "has the highest mean, within the spread of the seeds,"
    return f"{setting(groups[best], name)} {words} of {len(groups)}"


@styled
def initial_stage(name: str, groups: Sequence[Group], metrics: Mapping[int, Sequence[dict[str, Any]]]) -> Figure:
    """Accuracy of the full structure on held-out images while the estimator first trains, a line for each run (figure 5
    (b) of the paper), a panel for each task.

    metrics: the lines of each run's metrics, by the id of its record.
    """
    tasks = groups[0].tasks
    figure = Figure(figsize=(5.4 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for k, group in enumerate(groups):
            for record in group.records:
                lines = [
                    line for line in metrics[id(record)] if line.get("stage") == 1 and line["phase"] == "estimator"
                ]
                accuracy = [100 * line["held_out"][task]["accuracy"] for line in lines]
                label = f"{setting(group, name)}" if record is group.first else None
                axes.plot([line["step"] for line in lines], accuracy, color=SHADES[k % len(SHADES)], label=label)
        axes.set(xlabel="updates of the estimator", ylabel="accuracy in %, held-out images", title=task)
        axes.grid(color="#eeeeee")
    figure.axes[0].legend(frameon=False)
    headline(figure, f"{NAMES.get(name, name)}:\nthe first stage, at the full structure")
    return figure


def setting(group: Group, name: str) -> object:
    """The value of a setting by its flat name."""
    value: object = group.first.settings
    for part in name.split("."):
        value = value[part]  # type: ignore[index]
    return value
