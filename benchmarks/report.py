"""Print, keep and draw results: ``python -m benchmarks.report [JSON] [--keep] [--readme] [--out FOLDER]``.

JSON is what ``pytest benchmarks/ --benchmark-only --benchmark-json=JSON`` wrote. Without it, what is kept in
benchmarks/results is printed. With --keep its rows replace those of the same cases in results/<machine>.json there.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from den.support.tables import write_section
from den.support.terminal import ended

from . import losses, results, tables
from .summary import summary_table
from .targets import Row

README, PAGE = results.ROOT / "README.md", results.ROOT / "docs" / "benchmarks.md"


def section(title: str, rows: Sequence[Row]) -> str:
    """One machine's results in Markdown: targets, where we lose, all cases, memory."""
    parts = [f"## {title}", tables.provenance(rows)]
    optional = {
        "### Targets": functools.partial(tables.targets_table, only_measured=True),
        "### Where we lose": tables.losses_table,
        "### Cases": tables.cases_table,
    }
    optional |= {"### Providers": tables.providers_table, "### Peak memory": tables.memory_table}
    optional["### Beside a busy process"] = tables.contention_table
    for heading, make in optional.items():
        if (text := make(rows)).count("\n") > 1:
            parts += [heading, text]
    return "\n\n".join(parts)


def by_machine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each machine, sorted by case."""
    machines = dict.fromkeys(row["machine"] for row in rows)
    return {name: results.merge([], [row for row in rows if row["machine"] == name]) for name in machines}


def readme_section(paths: Sequence[Path]) -> str:
    """The part of the README between its markers: a row for each kind of target, on the first of the machines."""
    if not paths:
        return "No results are kept yet: see benchmarks/README.md."
    rows = results.load(paths[0])
    return f"{summary_table(rows)}\n\n{_losses_and_machines(rows, paths)}"


def page_section(paths: Sequence[Path]) -> str:
    """The part of docs/benchmarks.md between its markers: every target, on the first of the machines."""
    if not paths:
        return "No results are kept yet."
    rows = results.load(paths[0])
    return f"{tables.targets_table(rows)}\n\n{_losses_and_machines(rows, paths)}"


def _losses_and_machines(rows: Sequence[Row], paths: Sequence[Path]) -> str:
    """The cases that we lose, by name, and which machine and versions were measured."""
    broken = [loss for loss in losses.losses(rows) if loss.counts]
    timed = sum("providers" in row for row in rows)
    names = "".join(f"\n- `{loss.row['case']}`: {loss.best}, {losses.reason(loss)}" for loss in broken)
    count = f"{len(broken)} of {timed}{':' if broken else '.'}"
    lost = f"Cases in which something else is more than 2 % faster though a fifth of the FLOPs is saved: {count}"
    others = ", ".join(f"`{path.name}`" for path in paths[1:])
    more = f" Other machines: {others} in `benchmarks/results`." if others else ""
    return f"{lost}{names}\n\n{tables.provenance(rows)}{more}"


def rows_asked_for(path: Path | None) -> list[Row]:
    """The rows of a run of pytest-benchmark, or all that is kept. Raises ValueError for a file of another form."""
    if path is None:
        return [row for kept in results.results_files() for row in results.load(kept)]
    try:
        return results.rows_of_run(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a JSON of pytest --benchmark-json, got one without {error}") from error


def write(rows: Sequence[Row], text: str, folder: Path) -> list[Path]:
    """The text as Markdown and the figures of every machine; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.md"]
    paths[0].write_text(text, encoding="utf-8")
    try:
        from .figures import draw_all
    except ImportError as error:
        print(f"report: figures are left out: {error}", file=sys.stderr)
        return paths
    for machine, own in by_machine(rows).items():
        paths += draw_all(own, folder / machine)
    return paths


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="?", type=Path, help="a run, as pytest's --benchmark-json wrote it")
    parser.add_argument("--keep", action="store_true", help="replace its cases in benchmarks/results/<machine>.json")
    parser.add_argument(
        "--readme", action="store_true", help="write the targets into README.md and docs/benchmarks.md (with --keep)"
    )
    parser.add_argument("--out", type=Path, help="write the tables and the figures to this folder")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    options = parse(arguments)
    try:
        rows = rows_asked_for(options.json)
        if options.json and (options.keep or options.readme):
            results.keep(json.loads(options.json.read_text(encoding="utf-8")))
        if options.readme:
            for path, make in ((README, readme_section), (PAGE, page_section)):
                write_section(path, "benchmarks", make(results.results_files()))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if not rows:
        print("report: no results yet; run pytest benchmarks/ --benchmark-only --benchmark-json=run.json")
        return 0
    text = "\n\n".join(section(machine, own) for machine, own in by_machine(rows).items()) + "\n"
    paths = write(rows, text, options.out) if options.out else []
    plain = options.colour == "never" or (options.colour == "auto" and not sys.stdout.isatty())
    print(text if plain else tables.coloured(text))
    for path in paths:
        print(f"written: {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
