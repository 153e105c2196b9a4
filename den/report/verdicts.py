"""Verdicts on the runs of a section, in words: what they show and what they do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from den.evaluate.comparison import Check
from den.report.groups import Group, Row, Section
from den.report.paper import MEAN
from den.report.tables import Table
from den.runs.evaluation import Evaluation, TaskResult

LEAST_SAVING = 1.7  # times fewer FLOPs, for a network within a point of its baseline
SAME_COST = 1.03
Points = Mapping[int, Sequence[Evaluation]]
"""Operating points of a run, by the id of its record."""
COMPARED = ("random", "blockdrop", "nestednet", "packnet", "routing", "cross-stitch", "adashare")


def verdicts(table: Table, points: Points | None = None) -> list[Check]:
    """Checks of every claim that these runs can confirm or refute; of an unfinished run only that it is unfinished.

    points: with them, the dense network and the compared methods are held against the operating point of fitting FLOPs.
    """
    section = table.section
    rows = [row for row in section.finished if row.method == "den"]
    found = [check for row in rows for check in _row_checks(table, row, points or {})]
    unfinished = [_unfinished(row) for row in section.rows if row.unfinished]
    return [*found, *_rho_checks(section, rows), *unfinished]


def _unfinished(row: Row) -> Check:
    label = row.label.replace(f", {row.unfinished}", "")
    return Check(f"{label}, {', '.join(row.tasks)}: trained to the end", row.unfinished, False)


def _row_checks(table: Table, row: Row, points: Points) -> Iterator[Check]:
    section, dense = table.section, table.section.dense
    variants = [row, *operating_points(row, points)]
    for task in row.tasks:
        name = f"{row.label}, {task}"
        if dense is not None and task in dense.tasks:
            limit = dense.stat("flops", task).mean / LEAST_SAVING
            yield _against_dense(_within(variants, limit, task), dense, task)
        for other in section.finished:
            if other.method.split()[0] in COMPARED and task in other.tasks:
                limit = SAME_COST * other.stat("flops", task).mean
                yield _against(_within(variants, limit, task), other, task)
        yield from _selection(name, row.results(task))
        if (realised := row.timing("realised", task)) is not None:
            yield Check(f"{name}: realised fraction at least 0.8", f"{realised.mean:.2f}", realised.mean >= 0.8)
    yield from _task_usage(row)
    yield from _against_paper(table, row)


def _against_dense(row: Row, dense: Row, task: str) -> Check:
    loss = 100 * (dense.stat("accuracy", task).mean - row.stat("accuracy", task).mean)
    ratio = row.stat("flops_ratio", task).mean
    saving = 1 / max(ratio, 1e-9)
    claim = f"{row.label}, {task}: within 1 point of dense at {LEAST_SAVING} times fewer FLOPs or more"
    return Check(claim, f"{-loss:+.2f} points at {saving:.2f}", loss <= 1 + 1e-9 and saving >= LEAST_SAVING)


def operating_points(row: Row, points: Points) -> list[Row]:
    """The operating points that all seeds of a row were measured at, as rows."""
    measured = [
        {(point.budget.limit, point.budget.unit): point for point in points.get(id(record), ()) if point.budget}
        for group in row.groups
        for record in group.records
    ]
    found = []
    for limit, unit in sorted(set.intersection(*map(set, measured))):
        of_runs = iter(measured)
        groups = tuple(Group(tuple(next(of_runs)[limit, unit] for _ in group.records)) for group in row.groups)
        found.append(Row(f"{row.label} at {limit:g} {unit}", row.method, row.rho, groups))
    return found


def _within(variants: list[Row], limit: float, task: str) -> Row:
    """The dearest variant of at most so many FLOPs; the first where all cost more."""
    fitting = [row for row in variants if row.stat("flops", task).mean <= limit]
    return max(fitting, key=lambda row: row.stat("flops", task).mean, default=variants[0])


def _against(row: Row, other: Row, task: str) -> Check:
    """Check that ours is more accurate than a compared method, or as accurate and cheaper.

    Not decided where the better one costs more.
    """
    gain = 100 * (row.stat("accuracy", task).mean - other.stat("accuracy", task).mean)
    cost = row.stat("flops", task).mean / max(other.stat("flops", task).mean, 1e-9)
    better = gain > 0 or (gain == 0 and cost < 1 / SAME_COST)
    decided = cost <= SAME_COST if better else cost >= 1 / SAME_COST
    holds = better if decided else None
    claim = f"{row.label}, {task}: more accurate than {other.label} at equal FLOPs"
    return Check(claim, f"{gain:+.2f} at {cost:.2f} of them", holds)


def _selection(name: str, results: list[TaskResult]) -> Iterator[Check]:
    fewest = min(result.structures for result in results)
    variety = min(result.variety for result in results)
    yield Check(f"{name}: structures differ between images", f"{fewest} or more, {variety:.2f} nats", fewest > 1)


def _task_usage(row: Row) -> Iterator[Check]:
    """Check that the tasks of a network use some block differently."""
    results = row.groups[0].first.tasks
    if len(row.groups) > 1 or len(results) < 2:
        return
    usage = torch.tensor([result.usage for result in results])
    gaps = usage.amax(0) - usage.amin(0)
    block, gap = int(gaps.argmax()), gaps.max().item()
    yield Check(f"{row.label}: levels differ between tasks", f"by {gap:.0%} in block {block + 1}", gap >= 0.05)


def _against_paper(table: Table, row: Row) -> Iterator[Check]:
    """Check that a network falls no further below its dense baseline than the paper's does below its own."""
    dense = table.section.dense
    for line in table.lines:
        base = table.paper_dense(line.task)
        if line.row is not row or line.paper is None or base is None or dense is None:
            continue
        if line.task != MEAN and line.task not in dense.tasks:
            continue
        theirs = line.paper.accuracy - base.accuracy
        ours = 100 * (row.stat("accuracy", line.task).mean - dense.stat("accuracy", line.task).mean)
        yield Check(
            f"{row.label}, {line.task}: no further below its dense baseline than the paper's ({theirs:+.2f})",
            f"{ours:+.2f}", ours >= min(theirs, 0.0),
        )  # fmt: skip


def _rho_checks(section: Section, rows: list[Row]) -> Iterator[Check]:
    """Checks that a smaller rho gives more FLOPs and no lower accuracy."""
    known = sorted(((row.rho, row) for row in rows if row.rho is not None), key=lambda pair: -pair[0])
    for (larger, large), (smaller, small) in itertools.pairwise(known):
        for task in (t for t in small.tasks if t in large.tasks and larger > smaller):
            flops = [row.stat("flops", task).mean / 1e6 for row in (large, small)]
            accuracy = [100 * row.stat("accuracy", task).mean for row in (large, small)]
            yield Check(
                f"{task}: rho = {small.rho:g} costs more than {large.rho:g} and is no less accurate",
                f"{flops[1]:.1f} and {flops[0]:.1f} MFLOP, {accuracy[1]:.2f} and {accuracy[0]:.2f} %",
                flops[1] > flops[0] and accuracy[1] >= accuracy[0],
            )  # fmt: skip
