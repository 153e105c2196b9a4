"""Keep and print results: ``python -m benchmarks.report [JSON] [--markdown FILE] [--readme]``.

JSON is what ``pytest benchmarks/ --benchmark-only --benchmark-json=JSON`` wrote: its rows replace those of the same
cases in benchmarks/results/<machine>.json. Without it, what is kept there is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .targets import TARGETS, Row, Target

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
MEASURES = {
    "realised": "realised fraction",
    "overhead": "over bare convolutions",
    "speed": "speed against dense",
    "dense_share": "time / dense",
    "peak_share": "peak memory / dense",
}
PERCENT = ("overhead", "dense_share", "peak_share")


def rows_of_run(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in pytest-benchmark's JSON, each with the commit and the day it was measured."""
    commit = run.get("commit_info", {})
    source = {"commit": commit.get("id", "unknown"), "modified": bool(commit.get("dirty")), "measured": run["datetime"]}
    found = [bench["extra_info"] | source for bench in run["benchmarks"]]
    return [row for row in found if "case" in row]


def merge(kept: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, sorted by case; a new row replaces the kept one of its case.

    >>> merge([{"case": "a", "x": 1}, {"case": "b"}], [{"case": "a", "x": 2}])
    [{'case': 'a', 'x': 2}, {'case': 'b'}]
    """
    rows = {row["case"]: row for row in (*kept, *new)}
    return [rows[case] for case in sorted(rows)]


def load(path: Path) -> list[Row]:
    """The rows of a results file; none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def store(path: Path, rows: Sequence[Row]) -> None:
    """Write a results file, one row a line, so that a rerun changes the lines of its cases only."""
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"rows": [\n' + lines + "\n]}\n")


def keep(run: dict[str, Any]) -> list[Path]:
    """Merge a run into the results file of its machine; the files written."""
    rows = rows_of_run(run)
    paths = []
    for machine in sorted({row["machine"] for row in rows}):
        path = RESULTS / f"{machine}.json"
        store(path, merge(load(path), [row for row in rows if row["machine"] == machine]))
        paths.append(path)
    return paths


def number(value: float | None, measure: str) -> str:
    """A measured number or a bound as the tables show it.

    >>> number(0.951, "realised"), number(0.0612, "overhead"), number(None, "speed")
    ('0.95', '6.1 %', '-')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if measure in PERCENT else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    """Three significant digits, never an exponent for the large: ``milliseconds(0.00123) == "1.23"``."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded, all but the first aligned right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, strict=True)
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, lines)])


def target_line(target: Target, rows: dict[str, Row]) -> list[str]:
    """What, which measure, the target, what was measured, whether it is met."""
    value = target.measured(rows[target.case]) if target.case in rows else None
    sign = "≥" if target.is_lower_bound else "≤"
    verdict = "not measured" if value is None else "yes" if target.is_met(value) else "**no**"
    bound, measured = number(target.bound, target.measure), number(value, target.measure)
    return [target.what, MEASURES[target.measure], f"{sign} {bound}", measured, verdict]


def targets_table(rows: Iterable[Row]) -> str:
    """Every target beside what was measured."""
    by_case = {row["case"]: row for row in rows}
    lines = [target_line(target, by_case) for target in TARGETS]
    return table(["case", "measure", "target", "measured", "met"], lines)


def case_line(row: Row) -> list[str]:
    """Milliseconds of ours, the best dense and the rest, and what they mean."""
    providers = row["providers"]
    ours, dense = providers["ours"], row["best_dense"]
    bare = row["bare"]
    others = [providers[name]["median"] if name in providers else None for name in ("masked", "bucket", bare)]
    ratio = row["flops_ratio"]
    return [
        row["case"],
        milliseconds(ours["median"]),
        f"{milliseconds(providers[dense]['median'])} ({dense.removeprefix('dense-')})",
        *("-" if seconds is None else milliseconds(seconds) for seconds in others),
        "-" if ratio is None else f"{ratio:.2f}",
        f"{1 / ours['dense_share']:.2f}",
        number(ours["realised"], "realised"),
        number(ours["realised_tuned"], "realised"),
        number(ours.get("overhead"), "overhead"),
        f"{100 * ours['floor_share']:.0f} %",
    ]


def cases_table(rows: Iterable[Row]) -> str:
    """Every timed case; times are medians in milliseconds."""
    header = ["case", "ours", "best dense", "masked", "bucket", "bare conv.", "FLOPs ratio", "speed-up", "realised"]
    header += ["vs packed", "over bare", "of floor"]
    return table(header, [case_line(row) for row in rows if "providers" in row])


def memory_table(rows: Iterable[Row]) -> str:
    """Peak memory of every network in MiB, with what stays after a forward pass (weights and their folded copies)."""
    lines = [
        [
            row["case"],
            name,
            f"{peak['peak'] / 2**20:.0f}",
            f"{peak['kept'] / 2**20:.0f}",
            f"{peak['working'] / 2**20:.0f}",
        ]
        for row in rows
        for name, peak in row.get("peaks", {}).items()
    ]
    return table(["case", "provider", "peak MiB", "kept", "working"], lines)


def provenance(rows: Sequence[Row]) -> str:
    """One line: machine, threads, versions, commits, days of the rows."""

    def each(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    versions = each(f"{name} {version}" for row in rows for name, version in row["versions"].items())
    commits = each(row["commit"][:10] + (" with changes" if row["modified"] else "") for row in rows)
    days = each(row["measured"][:10] for row in rows)
    threads = each(str(row["threads"]) for row in rows)
    return f"{each(row['processor'] for row in rows)}, {threads} threads; {versions}; commit {commits}; {days}."


def results_files() -> list[Path]:
    """The kept results of pytest-benchmark, a file a machine; those of gpu_check have another form."""
    return [path for path in sorted(RESULTS.glob("*.json")) if "rows" in json.loads(path.read_text())]


def markdown(paths: Sequence[Path]) -> str:
    """Targets, then all cases, for every machine."""
    parts = []
    for path in paths:
        rows = load(path)
        parts += [f"## {path.stem}", provenance(rows), targets_table(rows), cases_table(rows), memory_table(rows)]
    return "\n\n".join(parts) + "\n"


def readme_section(paths: Sequence[Path]) -> str:
    """What stands between the README's markers: the targets of every machine."""
    parts = [f"{targets_table(rows)}\n\n{provenance(rows)}" for rows in map(load, paths)]
    return "\n\n".join(parts) if parts else "No results are kept yet: see benchmarks/README.md."


def with_section(readme: str, section: str) -> str:
    """``readme`` with ``section`` between its markers. Raises ValueError if it does not have both, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"report: README must hold the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def readme_agrees(readme: str, paths: Sequence[Path]) -> bool:
    """Whether the README's table is the one that the kept results give."""
    return with_section(readme, readme_section(paths)) == readme


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="?", type=Path, help="a run to keep, as pytest's --benchmark-json wrote it")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--readme", action="store_true", help="write the table of targets into README.md")
    options = parser.parse_args(arguments)
    try:
        paths = keep(json.loads(options.json.read_text())) if options.json else results_files()
        if options.readme:
            README.write_text(with_section(README.read_text(), readme_section(results_files())))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if not paths:
        print("report: no results are kept yet; run pytest benchmarks/ --benchmark-only --benchmark-json=run.json")
        return 0
    text = markdown(paths)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
