#!/usr/bin/env python3
"""Counts the lines of den and den_kernels that the tests run, in processes that they start, too.

    scripts/coverage.py [--keep FOLDER] [--write] [pytest arguments]        needs `pip install coverage`

Runs the whole suite in two processes unless the arguments say otherwise; pyproject.toml says what is counted.  --keep
adds what is counted to what earlier calls left in a folder, so that the suite can run in parts.  --write puts the
shares into docs/results/trust.md.  Kernels of Triton and Gluon are not counted: they are compiled, and what runs them
is the interpreter and the twin (tests/kernels/interpreter, tests/gluon_twin.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from den.support.tables import markdown_table, write_section

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/trust.md"
COVERAGE = [sys.executable, "-m", "coverage"]
LEAST = 0.8  # files below this share are listed
KERNELS = "den_kernels/_triton/"


def measured(arguments: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
    """The exit status of the tests, and coverage's report of them and of those that left their counts in `folder`."""
    environment = {**os.environ, "COVERAGE_FILE": str(folder / "data"), "COVERAGE_RCFILE": str(ROOT / "pyproject.toml")}
    status = subprocess.run([*COVERAGE, "run", "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode
    for step in (["combine", "-q", "--append"], ["json", "-q", "-o", str(folder / "report.json")]):
        subprocess.run([*COVERAGE, *step], cwd=ROOT, env=environment, check=True)
    return status, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def counts(files: Mapping[str, Any], prefix: str = "", apart: str = "-") -> tuple[int, int]:
    """Lines that ran, and all lines, of the files below `prefix`, without those below `apart`."""
    found = [each["summary"] for name, each in files.items() if name.startswith(prefix) and not name.startswith(apart)]
    return sum(each["covered_lines"] for each in found), sum(each["num_statements"] for each in found)


def table(report: dict[str, Any]) -> str:
    """The shares of both packages, and the files of which little runs."""
    files = report["files"]
    parts = {
        "`den`": counts(files, "den/"),
        "`den_kernels` without `_triton`": counts(files, "den_kernels/", KERNELS),
        "`den_kernels/_triton` without the kernels": counts(files, KERNELS),
        "all": counts(files),
    }
    rows = [[name, f"{ran:,}", f"{lines:,}", f"{ran / max(lines, 1):.1%}"] for name, (ran, lines) in parts.items()]
    low = sorted(name for name, each in files.items() if each["summary"]["num_statements"] > 0
                 and each["summary"]["percent_covered"] < 100 * LEAST)  # fmt: skip
    told = [f"- `{name}`: {files[name]['summary']['percent_covered']:.0f} %" for name in low]
    head = markdown_table(["part", "lines that ran", "lines", "share"], rows)
    return "\n".join([head, "", f"Files below {LEAST:.0%}:" if told else f"No file is below {LEAST:.0%}.", "", *told])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder that keeps the counts, to which later calls add theirs")
    parser.add_argument("--write", action="store_true", help="put the shares into docs/results/trust.md")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = (options.keep or Path(folder)).resolve()
        kept.mkdir(parents=True, exist_ok=True)
        status, report = measured(arguments or ["tests", "-q", "-n", "2"], kept)
    text = table(report)
    print(text)
    if options.write:
        write_section(PAGE, "coverage", text)
    return status


if __name__ == "__main__":
    sys.exit(main())
