"""The targets in few rows: those of one kind together, with the one that is nearest to its target."""

from collections.abc import Iterable

from den.support.tables import markdown_table

from . import tables
from .targets import TARGETS, Row, Target

KINDS = {  # of a target, by the suite of its case and its measure; a target of another kind has a row of its own
    ("residual", "realised"): "residual block, {dtype}",
    ("residual", "overhead"): "residual block in place",
    ("residual", "speed"): "residual block, all at the full level",
    ("residual", "dense_share"): "residual block, all at level 0",
    ("network", "realised"): "WRN-32-4, ResNet-42",
    ("memory", "peak_share"): "WRN-32-4, ResNet-42",
    ("memory", "frozen_share"): "WRN-32-4, ResNet-42, frozen",
    ("dag", "throughput"): "DAG, one batch / task after task",
    ("dag", "floor_share"): "DAG of large maps",
    ("dag", "realised"): "DAG",
    ("contention", "growth"): "WRN-32-4 beside a busy process",
}


def kind(target: Target) -> str:
    """Title of the row that a target belongs to, within its measure."""
    suite, *_, dtype = target.case.split("/")
    return KINDS.get((suite, target.measure), target.what).format(dtype=dtype)


def margin(target: Target, value: float) -> float:
    """Distance of a measured value from its target, relative to the target: below 0 where it is missed."""
    return (value / target.bound - 1) * (1 if target.is_lower_bound else -1)


def summary_table(rows: Iterable[Row]) -> str:
    """A row for every kind of target: how many are met, and the nearest to its target, or the furthest from it."""
    by_case = {row["case"]: row for row in rows}
    groups: dict[tuple[str, str], list[tuple[Target, float]]] = {}
    for target in TARGETS:
        value = target.measured(by_case[target.case]) if target.case in by_case else None
        if value is not None:
            groups.setdefault((kind(target), target.measure), []).append((target, value))
    lines = []
    for (title, measure), measured in groups.items():
        worst, _ = min(measured, key=lambda each: margin(*each))
        _, _, against, bound, shown, _ = tables.target_line(worst, by_case)
        met = sum(target.is_met(value) for target, value in measured)
        count = f"{met} of {len(measured)}" if met == len(measured) else f"**{met} of {len(measured)}**"
        lines.append([title, tables.MEASURES[measure], count, bound, shown, worst.what, against])
    header = ["what", "measure", "met", "target", "measured", "in the case", "against"]
    return markdown_table(header, lines, left=("in the case", "against"))
