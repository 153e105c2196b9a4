"""Verdicts on the runs of a section, in words, by the rule of `den.report.evidence`: what they show, and what not."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from den.evaluate.comparison import Check
from den.report.evidence import Interval, above_chance, all_of, judged, paired
from den.report.groups import Group, Row
from den.report.paper import MEAN
from den.report.tables import Table
from den.runs.evaluation import Evaluation, TaskResult

LEAST_SAVING = 1.7  # times fewer FLOPs, for a network within a point of its baseline
SAME_COST = 1.03
LEAST_INFORMATION = 0.02  # nats per block above an untrained selector's
LEAST_GAP = 0.05  # of a block's weights, between the tasks that use it most and least
Points = Mapping[int, Sequence[Evaluation]]
"""Operating points of a run, by the id of its record."""
COMPARED = ("random", "blockdrop", "nestednet", "packnet", "routing", "cross-stitch", "adashare")


def verdicts(table: Table, points: Points | None = None) -> list[Check]:
    """Checks of every claim that these runs could confirm or refute; of an unfinished run only that it is unfinished.

    points: with them, the dense network and the compared methods are held against the operating point of fitting FLOPs.
    """
    section = table.section
    rows = [row for row in section.finished if row.method == "den"]
    found = [check for row in rows for check in _row_checks(table, row, points or {})]
    unfinished = [_unfinished(row) for row in section.rows if row.unfinished]
    return [*found, *_rho_checks(rows), *unfinished]


def trained(row: Row, tasks: Iterable[str]) -> bool:
    """Return True where a row's accuracy is above chance on every one of the tasks, in every seed."""
    return all(above_chance(r.accuracy, r.chance, r.images) for task in tasks for r in row.results(task))


def _unfinished(row: Row) -> Check:
    label = row.label.replace(f", {row.unfinished}", "")
    return Check(f"{label}, {', '.join(row.tasks)}: trained to the end", row.unfinished, False)


def _row_checks(table: Table, row: Row, points: Points) -> Iterator[Check]:
    section, dense = table.section, table.section.dense
    variants = [row, *operating_points(row, points)]
    for task in row.tasks:
        name = f"{row.label}, {task}"
        yield _above_chance(name, row.results(task))
        if dense is not None and task in dense.tasks:
            limit = dense.stat("flops", task).mean / LEAST_SAVING
            yield _against_dense(_within(variants, limit, task), dense, task)
        for other in section.finished:
            if other.method.split()[0] in COMPARED and task in other.tasks:
                limit = SAME_COST * other.stat("flops", task).mean
                yield _against(_within(variants, limit, task), other, task)
        yield from _choice(name, row.results(task), trained(row, [task]))
        timings = [result.timing for result in row.results(task)]
        if timings and None not in timings:
            realised = [timing.realised for timing in timings if timing]
            claim = f"{name}: realised fraction at least 0.8"
            yield judged(claim, realised, above=0.8, sign=False, trained=trained(row, [task]))
    yield from _task_usage(row)
    yield from _against_paper(table, row)


def _above_chance(name: str, results: Sequence[TaskResult]) -> Check:
    worst = min(results, key=lambda result: result.accuracy - result.chance)
    holds = above_chance(worst.accuracy, worst.chance, worst.images)
    return Check(f"{name}: above chance", f"{worst.accuracy:.2%}, chance is {worst.chance:.2%}", holds)


def _against_dense(row: Row, dense: Row, task: str) -> Check:
    claim = f"{row.label}, {task}: within 1 point of dense at {LEAST_SAVING} times fewer FLOPs or more"
    change = paired(row.by_seed("accuracy", task), dense.by_seed("accuracy", task))
    saving = [1 / max(ratio, 1e-9) for ratio in row.by_seed("flops_ratio", task).values()]
    able = trained(row, [task]) and trained(dense, [task])
    close = judged(claim, change, above=-0.01, scale=100, trained=able)
    holds = all_of(close.holds, Interval.of(saving).above(LEAST_SAVING) if len(saving) > 1 else None)
    return Check(claim, f"{close.measured}, at {Interval.of(saving).words(sign=False)} times fewer", holds)


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
    """The most expensive variant within a budget of FLOPs; the first one where all cost more."""
    fitting = [row for row in variants if row.stat("flops", task).mean <= limit]
    return max(fitting, key=lambda row: row.stat("flops", task).mean, default=variants[0])


def _against(row: Row, other: Row, task: str) -> Check:
    """Check that ours is more accurate than a compared method at equal FLOPs.

    Open where the more accurate one costs more, and between networks that are both at chance.
    """
    gain = paired(row.by_seed("accuracy", task), other.by_seed("accuracy", task))
    cost = row.stat("flops", task).mean / max(other.stat("flops", task).mean, 1e-9)
    claim = f"{row.label}, {task}: more accurate than {other.label} at equal FLOPs"
    check = judged(claim, gain, scale=100, trained=trained(row, [task]) or trained(other, [task]))
    decided = cost <= SAME_COST if check.holds else cost >= 1 / SAME_COST
    return Check(claim, f"{check.measured}, at {cost:.2f} of them", check.holds if decided else None)


def _choice(name: str, results: list[TaskResult], able: bool) -> Iterator[Check]:
    """Checks that a selector tells images apart, more than an untrained one does, and to their good."""
    fewest = min(result.structures for result in results)
    nulls = [result.null for result in results if result.null]
    if len(nulls) < len(results):
        yield Check(f"{name}: structures differ between images", f"{fewest} or more; no null was measured", None)
        return
    more = [result.information - null.information for result, null in zip(results, nulls, strict=True)]
    claim = f"{name}: structures differ between images, more than an untrained selector's"
    check = judged(claim, more, above=LEAST_INFORMATION, scale=1, digits=3, trained=able and fewest > 1)
    most = max(null.structures for null in nulls)
    words = f"{check.measured} nats per block; {fewest} structures or more, {most} or fewer untrained"
    yield Check(claim, words, check.holds)
    worth = [result.accuracy - null.shuffled for result, null in zip(results, nulls, strict=True)]
    yield judged(f"{name}: better than the same structures given to images by chance", worth, scale=100, trained=able)
    yield from _gain(name, results, able)


def _gain(name: str, results: list[TaskResult], able: bool) -> Iterator[Check]:
    """Checks against the best single structure that was chosen without the test images, and of where FLOPs are spent.

    None where `den evaluate --static`, `--dense` has not measured them of all seeds.
    """
    singles = [result.static for result in results if result.static and result.static.held_out]
    if len(singles) == len(results):
        gains = [result.accuracy - single.accuracy for result, single in zip(results, singles, strict=True)]
        claim = f"{name}: better than the best single structure of that cost, chosen on held-out images"
        yield judged(claim, gains, scale=100, trained=able)
    known = [result.cost_correlation for result in results if result.cost_correlation is not None]
    if len(known) == len(results):
        claim = f"{name}: images cost more where the dense network's loss is higher (rank correlation)"
        yield judged(claim, known, digits=3, trained=able)


def _task_usage(row: Row) -> Iterator[Check]:
    """Check that the tasks of a network use some block differently, more than by an untrained selector.

    Tasks that are labels of the same images share their structures (M3) and have nothing to show here.
    """
    if len(row.groups) > 1 or len(row.tasks) < 2 or row.groups[0].first.settings["data"].get("joint"):
        return
    records = row.groups[0].records
    claim = f"{row.label}: levels differ between tasks"
    if any(None in [result.null for result in record.tasks] for record in records):
        yield Check(claim, f"by {usage_gap([r.usage for r in records[0].tasks]):.0%}; no null was measured", None)
        return
    gaps = [usage_gap([result.usage for result in record.tasks]) for record in records]
    nulls = [usage_gap([result.null.usage for result in record.tasks if result.null]) for record in records]
    more = [gap - null for gap, null in zip(gaps, nulls, strict=True)]
    check = judged(claim, more, above=LEAST_GAP, scale=100, digits=0, trained=trained(row, row.tasks))
    words = f"by {min(gaps):.0%} of a block or more; above an untrained selector's by {check.measured}, in points"
    yield Check(claim, words, check.holds)


def usage_gap(usage: Sequence[Sequence[float]]) -> float:
    """The widest gap between tasks in the use of a block: of [K][N] shares."""
    return max(max(block) - min(block) for block in zip(*usage, strict=True))


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
        tasks = row.tasks if line.task == MEAN else [line.task]
        yield judged(
            f"{row.label}, {line.task}: no further below its dense baseline than the paper's ({theirs:+.2f})",
            paired(row.by_seed("accuracy", line.task), dense.by_seed("accuracy", line.task)),
            above=min(theirs, 0.0) / 100, scale=100, trained=trained(row, tasks) and trained(dense, tasks),
        )  # fmt: skip


def _rho_checks(rows: list[Row]) -> Iterator[Check]:
    """Checks that a smaller rho gives more FLOPs and is more accurate."""
    known = sorted(((row.rho, row) for row in rows if row.rho is not None), key=lambda pair: -pair[0])
    for (larger, large), (smaller, small) in itertools.pairwise(known):
        for task in (t for t in small.tasks if t in large.tasks and larger > smaller):
            able = trained(large, [task]) and trained(small, [task])
            pair = f"{task}: rho = {small.rho:g} {{}} than {large.rho:g}"
            for claim, name, scale, unit in (
                ("costs more", "flops", 1e-6, "MFLOP"),
                ("is more accurate", "accuracy", 100, "points"),
            ):
                check = judged(
                    pair.format(claim), paired(small.by_seed(name, task), large.by_seed(name, task)), scale=scale,
                    trained=able,
                )  # fmt: skip
                yield Check(check.claim, f"{check.measured} ({unit})", check.holds)
