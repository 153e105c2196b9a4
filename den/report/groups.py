"""Evaluations put together: runs that differ in nothing but their seed, and the rows and sections of the tables."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from den.report.paper import COUNTS_ALL, MEAN
from den.runs.evaluation import Evaluation, TaskResult
from den.support.settings import flattened, from_dict, to_dict
from den.train.config import TrainConfig

NOT_SETTINGS = ("out", "seed", "progress", "device", "data.root")


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float | None  # of the sample; None for one seed
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat:
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed."""

    records: tuple[Evaluation, ...]
    repeated: tuple[tuple[Evaluation, Evaluation], ...] = ()  # a run left out, and the one of its seed that is shown

    @property
    def first(self) -> Evaluation:
        return min(self.records, key=lambda record: record.seed)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(result.task for result in self.first.tasks)

    def results(self, task: str) -> list[TaskResult]:
        """Results of a task, a run after the other."""
        return [result for record in self.records for result in record.tasks if result.task == task]


@dataclass(frozen=True, eq=False)
class Row:
    """A method in a section: one group, or groups that have different tasks each (a network for each of them)."""

    label: str
    method: str  # as in `PaperEntry.method`
    rho: float | None
    groups: tuple[Group, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for group in self.groups for task in group.tasks)

    @property
    def unfinished(self) -> str:
        """Progress of its unfinished runs, in words; empty when all have finished."""
        return "; ".join(dict.fromkeys(g.first.unfinished for g in self.groups if g.first.unfinished))

    def results(self, task: str) -> list[TaskResult]:
        return [result for group in self.groups for result in group.results(task)]

    def stat(self, name: str, task: str) -> Stat:
        """A number of `TaskResult`, over seeds; of `MEAN`: of its mean over tasks, seed by seed."""
        if task != MEAN:
            return Stat.of(getattr(result, name) for result in self.results(task))
        seeds = set.intersection(*({record.seed for record in group.records} for group in self.groups))
        every = [record for group in self.groups for record in group.records]
        chosen = [[record for record in every if record.seed == seed] for seed in sorted(seeds)] or [every]
        return Stat.of(statistics.fmean(getattr(t, name) for r in records for t in r.tasks) for records in chosen)

    def by_seed(self, name: str, task: str) -> dict[int, float]:
        """A number of `TaskResult` by seed; of `MEAN`: its mean over tasks, of the seeds that every task has."""
        if task == MEAN:
            each = [self.by_seed(name, one) for one in self.tasks]
            seeds = set.intersection(*map(set, each))
            return {seed: statistics.fmean(values[seed] for values in each) for seed in sorted(seeds)}
        return {
            record.seed: getattr(result, name)
            for group in self.groups
            for record in group.records
            for result in record.tasks
            if result.task == task
        }

    def timing(self, name: str, task: str) -> Stat | None:
        """A number of `Timing`, over seeds; None where a run was not timed."""
        timings = [result.timing for result in self.results(task)]
        return None if None in timings or not timings else Stat.of(getattr(timing, name) for timing in timings)

    @property
    def parameters(self) -> float:
        """Weights of all networks that the row needs, counted as the paper counts them (`counted`)."""
        return float(sum(group.first.parameters.blocks + counted(group.first) for group in self.groups))

    def used_parameters(self, task: str) -> float:
        """Weights that an image of a task uses, counted as `parameters` are: the mean over images and seeds."""
        return self.stat("parameters", task).mean + counted(self.groups[0].first)


@dataclass(frozen=True, eq=False)
class Section:
    """A scenario on a backbone: a table."""

    scenario: str | None
    backbone: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.scenario.upper() if self.scenario else ' + '.join(self.tasks)}, {self.backbone}"

    @property
    def finished(self) -> list[Row]:
        """The rows that something can be concluded from."""
        return [row for row in self.rows if not row.unfinished]

    @property
    def dense(self) -> Row | None:
        """The baseline: a dense network for each task where there are such, else one for all; finished."""
        rows = [row for row in self.finished if row.method == "dense" and set(row.tasks) == set(self.tasks)]
        return max(rows, key=lambda row: len(row.groups), default=None)


def counted(record: Evaluation) -> int:
    """Weights outside the blocks that the paper counts: the fully connected layers of VGG and SimpleConvNet."""
    return record.parameters.heads if record.backbone.startswith(COUNTS_ALL) else 0


def group_runs(records: Sequence[Evaluation]) -> list[Group]:
    """Runs of the same settings but for the seed; of the same seed the first counts.

    Runs that have not finished stand apart from those that have, and from those that have come less far.
    """
    found: dict[str, dict[int, list[Evaluation]]] = {}
    for record in records:
        key = json.dumps([settings_of(record), record.unfinished])
        found.setdefault(key, {}).setdefault(record.seed, []).append(record)
    groups = []
    for seeds in found.values():
        alike = [seeds[seed] for seed in sorted(seeds)]
        repeated = tuple((other, first) for first, *others in alike for other in others)
        groups.append(Group(tuple(records[0] for records in alike), repeated))
    return groups


def settings_of(record: Evaluation) -> dict[str, Any]:
    """Settings that tell runs apart, by flat names, without those of `NOT_SETTINGS`; and the name of the checkpoint."""
    settings = record.settings
    with contextlib.suppress(ValueError):  # of a later version
        settings = to_dict(
            from_dict(TrainConfig, settings)
        )  # those that an older version did not have are as they were
    flat = {name: value for name, value in flattened(settings).items() if name not in NOT_SETTINGS}
    return flat | {"checkpoint": record.checkpoint, "variant": record.variant, "start": bool(settings.get("start"))}


def sections(groups: Sequence[Group]) -> list[Section]:
    """Groups by scenario (without one: by tasks) and backbone, in the order of their first runs."""
    found: dict[tuple[str | None, str, str], list[Group]] = {}
    for group in groups:
        scenario = group.first.scenario
        key = (scenario, backbone_name(group.first), "" if scenario else _home(group, groups))
        found.setdefault(key, []).append(group)
    made = []
    for (scenario, backbone, _), members in found.items():
        largest_first = sorted(members, key=lambda group: -len(group.tasks))
        tasks = tuple(dict.fromkeys(task for group in largest_first for task in group.tasks))
        made.append(Section(scenario, backbone, tasks, tuple(_rows(members))))
    return made


def _home(group: Group, groups: Sequence[Group]) -> str:
    """The largest set of tasks, among groups without a scenario, that holds a group's tasks."""
    holding = [g for g in groups if g.first.scenario is None and set(group.tasks) <= set(g.tasks)]
    return "+".join(sorted(max(holding, key=lambda g: len(g.tasks)).tasks))


def backbone_name(record: Evaluation) -> str:
    """The backbone, as the paper's entries name it; its stages where they are not the name's."""
    network = record.settings["network"]
    if network.get("stages"):
        return f"{network['backbone']} {', '.join(f'{channels}x{blocks}' for channels, blocks in network['stages'])}"
    large = network["backbone"].startswith("simpleconvnet") and network["trunk_size"] >= 200
    if large and network["backbone"] == "simpleconvnet_strided":
        return "simpleconvnet_224"  # the paper's, by its counts
    return f"{network['backbone']} on 224x224" if large else network["backbone"]


def _rows(groups: Sequence[Group]) -> list[Row]:
    by_label: dict[str, list[Group]] = {}
    for group in groups:
        by_label.setdefault(method_label(group.first), []).append(group)
    rows = []
    for label, members in by_label.items():
        method, rho = method_of(members[0].first)
        tasks = [task for group in members for task in group.tasks]
        if len(tasks) == len(set(tasks)):
            rows.append(Row(label, method, rho, tuple(members)))
            continue
        shown = differences(members)
        rows += [Row(f"{label}{words}", method, rho, (group,)) for group, words in zip(members, shown, strict=True)]
    return rows


def method_of(record: Evaluation) -> tuple[str, float | None]:
    """Method and rho as in `PaperEntry`; of a single-task NestedNet also the share of the weights that it uses."""
    settings, method = record.settings, record.method
    if method == "den":
        selector = settings["selector"]
        return method, selector["rho"] if selector.get("budget") is None else None
    if method == "nestednet" and len(record.tasks) == 1:
        used = record.tasks[0].parameters / record.parameters.blocks
        return f"nestednet {Fraction(1, 2 ** max(0, round(-math.log2(max(used, 2**-9)))))}", None
    if method == "routing":
        return "routing over levels", None  # not the paper's, which chooses among blocks of separate weights
    return method, None


def method_label(record: Evaluation) -> str:
    """A method in words, with what it was trained for, and how far where it has not finished."""
    method, rho = method_of(record)
    if record.variant == "random":
        method = f"random selector on DEN (rho = {record.settings['selector']['rho']:g})"
    if method == "level":
        method = f"{record.settings['mode']}, all at {record.variant.replace('-', ' ')}"
    if method == "den":
        budget = record.settings["selector"].get("budget")
        method = f"DEN (rho = {rho:g})" if budget is None else f"DEN (budget {budget:g})"
    return f"{method}, {record.unfinished}" if record.unfinished else method


def differences(groups: Sequence[Group]) -> list[str]:
    """Settings in which groups differ, in words for each group; the data's only if nothing else does."""
    flat = [settings_of(group.first) for group in groups]
    names = [name for name in flat[0] if any(f.get(name) != flat[0][name] for f in flat)]
    named = [name for name in names if not name.startswith("data.")] or names
    return ["".join(f", {name} {f.get(name)}" for name in named) for f in flat]
