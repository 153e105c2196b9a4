#!/usr/bin/env python3
"""Draws 2,000 cases for every test of an op that draws any; the suite draws 4 to 120 of them.

    scripts/fuzz.py [FILE or TEST ...] [--seed 0] [--jobs 1] [--again] [--write]

Cases are compared with float64, or must agree with each other.  Each test runs in a process of its own, and its result
is kept in build/fuzz-SEED.json: what was interrupted goes on behind the tests that have passed.  A failing test is
printed with its smallest case, and the rest goes on.  --write puts the counts into docs/results/trust.md.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from den.support.files import write_text
from den.support.tables import markdown_table, write_section

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/trust.md"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", "hypothesis and not release"]
COUNTED = re.compile(r"- (\d+) passing, (\d+) failing, and (\d+) invalid test cases")


@dataclass
class Result:
    """The result of one test: its valid cases, and the seconds that they took."""

    passed: bool
    cases: int
    seconds: float


def drawing_files() -> list[str]:
    """The files of the ops' tests in which any test draws cases."""
    files = sorted(ROOT.glob("tests/kernels/test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "@given" in file.read_text(encoding="utf-8")]


def tests_in(names: list[str]) -> list[str]:
    """The tests that draw cases in these files, or of these names."""
    listed = subprocess.run([*PYTEST, "--collect-only", *names], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise SystemExit(f"fuzz: {' '.join(names)} must be tests that draw cases, got\n{listed.stdout[-2000:]}")
    return [line for line in listed.stdout.splitlines() if "::" in line]


def fuzzed(test: str, seed: int) -> Result:
    """Run one test on as many cases as the profile draws."""
    begun = time.perf_counter()
    long = ["--hypothesis-profile", "long", "--hypothesis-seed", str(seed), "--hypothesis-show-statistics"]
    done = subprocess.run([*PYTEST, *long, test], cwd=ROOT, capture_output=True, text=True)
    cases = sum(int(passing) for passing, _, _ in COUNTED.findall(done.stdout))
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:], sep="\n", flush=True)
    elif not cases:
        raise SystemExit(f"fuzz: Hypothesis must say how many cases {test} had, got\n{done.stdout[-2000:]}")
    return Result(done.returncode == 0, cases, time.perf_counter() - begun)


def table(results: dict[str, Result], seed: int) -> str:
    """Count the tests and cases of each file."""
    files: dict[str, list[Result]] = {}
    for test, result in results.items():
        files.setdefault(test.split("::")[0].removeprefix("tests/kernels/"), []).append(result)

    def row(name: str, of: Iterable[Result]) -> list[str]:
        of = list(of)
        failed = sum(not each.passed for each in of)
        minutes = sum(each.seconds for each in of) / 60
        return [name, str(len(of)), f"{sum(each.cases for each in of):,}", str(failed), f"{minutes:.1f}"]

    rows = [*(row(f"`{name}`", of) for name, of in sorted(files.items())), row("all", results.values())]
    head = markdown_table(["file", "tests", "cases passed", "tests failed", "minutes"], rows)
    few = [f"- `{test.split('/')[-1]}`: {each.cases} cases, all that there are" for test, each in results.items()
           if each.passed and each.cases < 2000]  # fmt: skip
    return "\n".join([f"Seed {seed}.", "", head, *([""] if few else []), *few])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="all of tests/kernels that draw, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="tests at once")
    parser.add_argument("--again", action="store_true", help="also those that have passed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/trust.md")
    options = parser.parse_args()
    kept = ROOT / f"build/fuzz-{options.seed}.json"
    kept.parent.mkdir(exist_ok=True)
    results = {}
    if kept.exists():
        results = {test: Result(**each) for test, each in json.loads(kept.read_text(encoding="utf-8")).items()}
    asked = tests_in(options.tests or drawing_files())
    left = [test for test in asked if options.again or test not in results or not results[test].passed]
    with ThreadPoolExecutor(options.jobs) as pool:
        for i, result in enumerate(pool.map(lambda test: fuzzed(test, options.seed), left)):
            results[left[i]] = result
            write_text(kept, json.dumps({test: asdict(each) for test, each in results.items()}, indent=1))
            print(f"{i + 1}/{len(left)} {left[i]}: {result}", flush=True)
    text = table(results, options.seed)
    print(text)
    if options.write:
        write_section(PAGE, "fuzz", text)
    return int(not all(results[test].passed for test in asked))


if __name__ == "__main__":
    sys.exit(main())
