"""The kept results: one file of rows a machine in benchmarks/results, a row a case."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from den.support.files import write_text

from .targets import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def store(path: Path, rows: Sequence[Row], **rest: Any) -> None:
    """Write a results file, whole or not at all, one row a line: a rerun changes the lines of its cases only."""
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    parts = ['"rows": [\n' + lines + "\n]", *(f'"{name}": {json.dumps(part, indent=1)}' for name, part in rest.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{" + ",\n".join(parts) + "}\n")


def keep(run: dict[str, Any], folder: Path = RESULTS) -> list[Path]:
    """Merge a run into the results file of its machine; the files written."""
    rows = rows_of_run(run)
    paths = []
    for machine in sorted({row["machine"] for row in rows}):
        path = folder / f"{machine}.json"
        store(path, merge(load(path), [row for row in rows if row["machine"] == machine]))
        paths.append(path)
    return paths


def results_files(folder: Path = RESULTS) -> list[Path]:
    """The kept results of CPUs; those of gpu_check have a "gpu" as well.

    The newest measurement comes first, but machines of which less than three quarters as many cases are kept as of
    another come behind the others: they were measured in part.
    """
    kept = {path: load(path) for path in folder.glob("*.json") if set(json.loads(path.read_text("utf-8"))) == {"rows"}}
    whole = 0.75 * max(map(len, kept.values()), default=0)

    def rank(path: Path) -> tuple[bool, str]:
        return len(kept[path]) >= whole, max((row["measured"] for row in kept[path]), default="")

    return sorted(sorted(kept), key=rank, reverse=True)
