"""The results of `benchmarks.gpu_check` as text: every case, every target met or not, what failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

# Blocks that keep their shape, so that level 0 leaves everything alone.
KEPT = ("64x32x32", "128x16x16", "256x8x8", "512x4x4")
STRIDED = ("64-128x32x32/2", "128-256x16x16/2", "256-512x8x8/2")
FIRST = ("16-64x32x32/1",)


class Target(NamedTuple):
    """A number to reach on an H200 in bfloat16 with 256 images."""

    what: str
    case: str
    provider: str
    measure: str  # "speed" or "realised" against the best dense, "share" of its time, "seconds", "against PROVIDER"
    bound: float

    @property
    def is_lower_bound(self) -> bool:
        """Whether more is better."""
        return self.measure not in ("share", "seconds")

    def measured(self, rows: Rows) -> float | None:
        """The number, None where it was not timed. Of the ways to compile the dense side the faster counts."""
        found = [self._measured(rows, case) for case in (self.case, f"{self.case} max-autotune")]
        known = [value for value in found if value is not None]
        return (min if self.is_lower_bound else max)(known, default=None)

    def _measured(self, rows: Rows, case: str) -> float | None:
        providers = rows.get(case, {}).get("providers", {})
        own = providers.get(self.provider, {})
        if self.measure.startswith("against "):
            other = providers.get(self.measure.removeprefix("against "), {})
            return other["median"] / own["median"] if other and own else None
        if self.measure == "speed":
            return 1 / own["dense_share"] if own.get("dense_share") else None
        return own.get({"share": "dense_share", "seconds": "median"}.get(self.measure, self.measure))

    def line(self, rows: Rows) -> dict[str, Any]:
        """The target beside what was measured; `met` is None where nothing was."""
        value = self.measured(rows)
        met = None if value is None else value >= self.bound if self.is_lower_bound else value <= self.bound
        return self._asdict() | {"measured": value, "met": met}


def _targets() -> list[Target]:
    found = [
        Target(f"convolution {shape}, {side} elastic, full level: speed against cuDNN", case, "op full", "speed", 0.85)
        for side, shapes in (("out", (*FIRST, *KEPT, *STRIDED)), ("in", KEPT))
        for shape in shapes
        for case in [f"conv-{side}/{shape}/bfloat16"]
    ]
    for shape in (*KEPT, *STRIDED):
        case = f"block/{shape}/bfloat16"
        found.append(Target(f"block {shape}, uniform mix: realised fraction", case, "op uniform", "realised", 0.9))
        if shape in KEPT:
            found.append(Target(f"block {shape}, all at level 0: time of dense", case, "op zero", "share", 0.03))
    for shape in ("256x8x8", "128x16x16"):
        case = f"block/{shape}/bfloat16"
        for mix, bound in (("full", 1.25), ("quarter", 1.5)):
            what = f"block {shape}, {mix} level: fused kernel against two launches"
            found.append(Target(what, case, f"fused {mix}", f"against composition {mix}", bound))
    network, training = "network/wrn32_4/bfloat16", "training/wrn32_4/bfloat16"
    return [
        *found,
        Target("plan of 20 blocks for 1,024 instances: seconds", "plan B=1024, N=20", "plan", "seconds", 10e-6),
        Target("training step of WRN-32-4 under eq. 8: time of dense compiled", training, "ours eq. 8", "share", 1.05),
        Target("WRN-32-4, uniform mix: realised fraction", network, "ours uniform", "realised", 1.0),
    ]


TARGETS = tuple(_targets())


def number(value: float | None, measure: str) -> str:
    """As the table shows it.

    >>> number(8.51e-6, "seconds"), number(0.0123, "share"), number(0.9, "realised"), number(None, "share")
    ('8.5 us', '1.2 %', '0.90', '-')
    """
    if value is None:
        return "-"
    if measure == "seconds":
        return f"{value * 1e6:.1f} us"
    return f"{value * 100:.1f} %" if measure == "share" else f"{value:.2f}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells padded, the first of a line to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def case_lines(row: Row) -> list[list[str]]:
    """A line for each contender of a timed case."""
    lines = []
    for i, (name, provider) in enumerate(row["providers"].items()):
        cells = [
            row["case"] if i == 0 else "",
            name,
            f"{provider['median'] * 1e6:.1f}",
            f"{provider['floor'] * 1e6:.1f}",
        ]
        for measure in ("flops_ratio", "dense_share", "realised"):
            value = provider.get(measure)
            cells.append("-" if value is None else f"{value:.3f}")
        lines.append([*cells, "graph" if provider["graph"] else "eager"])
    return lines


def cases_table(rows: Iterable[Row]) -> str:
    """All times in microseconds, beside floors, FLOPs ratio, share of the best dense, and realised fraction."""
    lines = [line for row in rows if row.get("providers") for line in case_lines(row)]
    header = ["case", "contender", "us", "floor", "FLOPs x", "of dense", "realised", "timed"]
    return columns([header, *lines]) if lines else "nothing was timed"


def targets_table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Every target, its bound, what was measured, and whether that meets it."""
    verdicts = {None: "not measured", True: "yes", False: "NO"}
    table = [["target", "bound", "measured", "met"]]
    for line in lines:
        sign = "<=" if line["measure"] in ("share", "seconds") else ">="
        bound, value = (number(line[name], line["measure"]) for name in ("bound", "measured"))
        table.append([line["what"], f"{sign} {bound}", value, verdicts[line["met"]]])
    return columns(table)


def render(document: Mapping[str, Any]) -> str:
    """The whole report, the most important lines last."""
    rows = [row for step in document["steps"].values() for row in step["cases"]]
    machine = next((row for row in rows if row["case"] == "machine"), {})
    skipped = [f"skipped {row['case']}: {row['reason']}" for row in rows if row["status"] == "skipped"]
    failed = [f"FAILED {row['case']}: {row['error']}" for row in rows if row["status"] == "failed"]
    rates = ", ".join(f"{name} {value / 1e12:.2f} T" for name, value in document["rates"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    good = sum(row["status"] == "ok" for row in rows)
    met = [line["met"] for line in document["targets"]]
    return "\n".join(
        [
            cases_table(rows),
            "",
            targets_table(document["targets"]),
            "",
            *shortened(skipped, 12),
            *shortened([line[:400] for line in failed], 20),
            f"{document['gpu']}, {versions}, commit {machine.get('commit')}; measured: {rates or '-'}",
            f"{good} checks passed, {len(failed)} failed, {len(skipped)} skipped; targets: {met.count(True)} met, "
            f"{met.count(False)} not met, {met.count(None)} not measured",
        ]
    )


def shortened(lines: list[str], most: int) -> list[str]:
    """The first lines, and how many more there are.

    >>> shortened(["a", "b", "c"], 1)
    ['a', '... and 2 more']
    """
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]
