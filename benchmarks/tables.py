"""Rows of results as Markdown tables, and those with colours for a terminal."""

import re
from collections.abc import Iterable, Sequence

from den.support.tables import markdown_table

from . import losses
from .targets import TARGETS, Row, Target

MEASURES = {
    "realised": "realised fraction",
    "overhead": "over bare convolutions",
    "speed": "speed against dense",
    "throughput": "throughput",
    "floor_share": "share of the floor",
    "dense_share": "time / dense",
    "seconds": "time",
    "peak_share": "peak memory / dense",
    "frozen_share": "peak memory / dense, folded",
    "growth": "time / time alone",
}
PEERS = 'pip install "den-kernels[peers]"'
ENGINES = ("openvino", "onnxruntime")  # what the dense networks of these suites also run on, where it is installed
NETWORKS = ("network", "latency-network", "contention")
PERCENT = ("overhead", "dense_share", "peak_share", "frozen_share")
GREEN, RED, YELLOW, BOLD, PLAIN = (f"\033[{code}m" for code in (32, 31, 33, 1, 0))


def number(value: float | None, measure: str) -> str:
    """A measured number or a bound as the tables show it.

    >>> number(0.951, "realised"), number(0.0612, "overhead"), number(None, "speed")
    ('0.95', '6.1 %', '-')
    """
    if value is None:
        return "-"
    if measure == "seconds":
        return f"{1e6 * value:.1f} us"
    return f"{100 * value:.1f} %" if measure in PERCENT else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    """Three significant digits, never an exponent for the large: ``milliseconds(0.00123) == "1.23"``."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def short(provider: str | None) -> str:
    """A provider's name without its role: ``short("dense-openvino") == "openvino"``; "-" for none."""
    return "-" if provider is None else provider.removeprefix("dense-")


def target_line(target: Target, rows: dict[str, Row]) -> list[str]:
    """Cells of a target's line: its name, the measure, against which provider, the bound, the value, yes or no."""
    row = target.row(rows)
    value = None if row is None else target.measured(row)
    sign = "≥" if target.is_lower_bound else "≤"
    verdict = "not measured" if value is None else "yes" if target.is_met(value) else "**no**"
    bound, measured = number(target.bound, target.measure), number(value, target.measure)
    against = short(None if row is None else target.against(row))
    return [target.what, MEASURES.get(target.measure, target.measure), against, f"{sign} {bound}", measured, verdict]


def targets_table(rows: Iterable[Row], *, only_measured: bool = False, targets: Sequence[Target] = TARGETS) -> str:
    """Table of all targets beside what was measured; only_measured: of those whose cases ran."""
    by_case = {row["case"]: row for row in rows}
    lines = [target_line(target, by_case) for target in targets if target.case in by_case or not only_measured]
    return markdown_table(["case", "measure", "against", "target", "measured", "met"], lines, left=("against",))


def case_line(row: Row) -> list[str]:
    """Milliseconds of ours, the best dense and the rest, and what they mean."""
    providers = row["providers"]
    ours, dense, ratio = providers["ours"], row["best_dense"], row["flops_ratio"]
    others = [providers[name]["median"] if name in providers else None for name in ("masked", "bucket", row["bare"])]
    dense_cell = f"{milliseconds(providers[dense]['median'])} ({short(dense)})" if dense else "-"
    best = losses.best_alternative(row)
    return [
        row["case"],
        milliseconds(ours["median"]),
        dense_cell,
        *("-" if seconds is None else milliseconds(seconds) for seconds in others),
        number(ratio, "speed"),
        number(1 / ours["dense_share"] if dense else None, "speed"),
        number(providers[best]["median"] / ours["median"] if best else None, "speed"),
        number(ours.get("realised"), "realised"),
        number(ours.get("realised_tuned"), "realised"),
        number(ours.get("overhead"), "overhead"),
        f"{100 * ours['floor_share']:.0f} %",
        "-" if ours.get("peak") is None else f"{ours['peak'] / 2**20:.3g}",
        row.get("way", "-"),
    ]


def cases_table(rows: Iterable[Row]) -> str:
    """Every timed case; times are medians in milliseconds, peaks those of a call in MiB."""
    header = ["case", "ours", "best dense", "masked", "bucket", "bare conv.", "FLOPs ratio", "speed-up", "vs best"]
    header += ["realised", "vs packed", "over bare", "of floor", "peak MiB", "way"]
    return markdown_table(header, [case_line(row) for row in rows if "providers" in row])


def providers_table(rows: Iterable[Row]) -> str:
    """Every provider of every timed case: role, milliseconds, what they mean, peak memory of a call in MiB."""
    lines = [
        [
            row["case"] if i == 0 else "",
            name if "precision" not in provider else f"{name} in {provider['precision']}",
            provider["role"],
            milliseconds(provider["median"]),
            number(provider.get("dense_share"), "dense_share"),
            number(provider.get("realised"), "realised"),
            f"{100 * provider['floor_share']:.0f} %",
            "graph" if provider.get("graph") else "call",
            "-" if provider.get("peak") is None else f"{provider['peak'] / 2**20:.3g}",
        ]
        for row in rows
        for i, (name, provider) in enumerate(sorted(row.get("providers", {}).items(), key=lambda p: p[1]["median"]))
    ]
    header = ["case", "provider", "role", "ms", "time / dense", "realised", "of floor", "timed", "peak MiB"]
    return markdown_table(header, lines, left=("provider", "role"))


def memory_table(rows: Iterable[Row]) -> str:
    """Peak memory of every network in MiB, with what stays after a forward pass (weights and their folded copies)."""
    lines = [
        [row["case"], name, *(f"{peak[kind] / 2**20:.0f}" for kind in ("peak", "kept", "working"))]
        for row in rows
        for name, peak in row.get("peaks", {}).items()
    ]
    return markdown_table(["case", "provider", "peak MiB", "kept", "working"], lines)


def contention_table(rows: Iterable[Row]) -> str:
    """Median milliseconds of every provider alone and beside a busy process, and by how much that is longer.

    of all calls: the same of the mean, which also counts the few calls that took very long.
    """
    lines = [
        [
            row["case"],
            name,
            milliseconds(found["alone"]),
            milliseconds(found["beside"]),
            number(found["growth"], "growth"),
            number(found["mean_growth"], "growth"),
        ]
        for row in rows
        for name, found in row.get("contention", {}).items()
    ]
    header = ["case", "provider", "alone", "beside a busy process", "growth", "of all calls"]
    return markdown_table(header, lines, left=("provider",))


def losses_table(rows: Iterable[Row]) -> str:
    """Table of the cases in which another provider is faster: which, by how much, and why."""
    lines = [
        [loss.row["case"], loss.best, f"{loss.factor:.2f}", "**yes**" if loss.counts else "no", losses.reason(loss)]
        for loss in losses.losses(rows)
    ]
    header = ["where we lose", "faster", "ours / it", "above 2 % at a fifth saved", "reason"]
    return markdown_table(header, lines, left=("faster", "reason"))


def provenance(rows: Sequence[Row]) -> str:
    """Line of text: machine, threads, versions, commits, days of the rows; what was not installed."""

    def each(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    versions = each(f"{name} {version}" for row in rows for name, version in row["versions"].items())
    commits = each(row["commit"][:10] + (" with changes" if row["modified"] else "") for row in rows)
    days = each(row["measured"][:10] for row in rows)
    threads = each(str(row["threads"]) for row in rows)
    processors = each(row["processor"] for row in rows)
    return f"{processors}, {threads} threads; {versions}{_absent(rows)}; commit {commits}; {days}."


def _absent(rows: Sequence[Row]) -> str:
    """The inference engines that the networks were not compared with, and in how many cases where not in all."""
    networks = [row for row in rows if row.get("suite") in NETWORKS and row.get("device", "cpu") == "cpu"]
    found = []
    for name in ENGINES:
        without = sum(name not in row["versions"] for row in networks)
        some = f" (in {without} of {len(networks)} networks)" if without < len(networks) else ""
        found += [name + some] if without else []
    return f"; not installed: {', '.join(found)}" if found else ""


def coloured(text: str) -> str:
    """The text with ANSI colours: headings bold, what is met green, what is not and where we lose red."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("#"):
            lines.append(f"{BOLD}{line}{PLAIN}")
            continue
        line = re.sub(r"\*\*(no|yes)\*\*", rf"{RED}\g<0>{PLAIN}", line)
        line = re.sub(r"(?<=\| )( *yes)(?= \|)", rf"{GREEN}\1{PLAIN}", line)
        lines.append(re.sub(r"(?<=\| )( *not measured)(?= \|)", rf"{YELLOW}\1{PLAIN}", line))
    return "\n".join(lines)
