#!/usr/bin/env python3
"""Would the tests notice?  Runs the tests of a part on copies of the code, each with one mistake.

    scripts/mutants.py [--each 10 | --cpp] [--only den_kernels/plan.py ...] [--seed 0] [--again] [--write]

Mistakes in Python are drawn by the seed from all those that `mistakes.py` makes of a file; those in C++ are written by
hand (`cpp_mistakes.py`).  Each runs in a process of its own: the tests fail, or take too long, or the mistake survives.
What was found is kept in build/mutants.json, so that the next call tries the survivors and what it has not tried.
--write puts the table and the survivors into docs/results/trust.md.
"""

import argparse
import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cpp_mistakes
from mistakes import Mistake, mistakes_of  # nothing of ours: the tests' processes import it anew

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/trust.md"
KEPT = ROOT / "build/mutants.json"
SECONDS = 240  # of the tests of a mistake
PHASE_TESTS = [
    f"tests/den/test_train.py::test_{name}"
    for name in (
        "phases_follow_algorithm_1", "dense_run_is_the_first_phase_only", "schedules",
        "phase_ends_when_the_loss_no_longer_falls",
    )
]  # fmt: skip
TESTS = {  # of each part, the quickest first
    "den_kernels/plan.py": [
        "tests/kernels/test_plan.py",
        "tests/kernels/test_dynamic_conv.py::test_errors_say_what_must_hold",
        "tests/kernels/test_dynamic_conv.py::test_ugly_sizes",
    ],
    "den/nn/levels.py": [
        "tests/den/test_levels.py",
        "tests/den/test_backbone_counts.py",
        "tests/den/test_block_kinds.py",
    ],
    "den/train/objective.py": ["tests/den/test_objective.py", "tests/den/test_joint.py"],
    "den/train/phases.py": [*PHASE_TESTS, "tests/den/test_scenarios.py"],
    "den/train/checkpoint.py": ["tests/den/test_checkpoint.py"],
    "den/dag/reduction.py": ["tests/dag/test_dag_graph.py"],
}
EQUIVALENT = cpp_mistakes.EQUIVALENT | {  # changes that are no mistakes, and why: listed, not tried
    "den/train/phases.py: selector_rate: float = 1.0": "read where a phase trains both networks, which sets it",
}
PRELOADED = [
    "numpy", "torch", "torch.distributed", "torch._dynamo", "safetensors.torch", "hypothesis", "pytest", "tyro",
    "PIL.Image",
]  # fmt: skip


def copy_tree(to: Path) -> None:
    """The checkout's files with the extension that is built in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in [*listed, *(str(p.relative_to(ROOT)) for p in (ROOT / "den_kernels").glob("_C*.so"))]:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_tests(tree: Path, tests: list[str]) -> bool:
    """True where these tests pass in a process that imports `tree`'s code; torch is loaded already."""
    if not (pid := os.fork()):
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        import pytest

        how = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
        os._exit(int(pytest.main([*how, *tests])))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def survivors_of(tree: Path, path: str, mistakes: list[Mistake], tests: list[str], objects: Path) -> list[Mistake]:
    """The mistakes in one file that its tests do not find."""
    file, left, found = tree / path, [], known_of(path)
    isa = "" if path.endswith(".py") else cpp_mistakes.float32_isa()
    whole = file.read_text(encoding="utf-8")
    for i, mistake in enumerate(mistakes, 1):
        passes = False
        if mistake.words not in found:
            file.write_text(mistake.text, encoding="utf-8")
            builds = path.endswith(".py") or cpp_mistakes.build_changed(tree, objects, path, isa)
            passes = builds and run_tests(tree, tests)
            print(f"{path} {i}/{len(mistakes)} {'SURVIVED' if passes else 'killed'}: {mistake.words}", flush=True)
        left += [mistake] if passes else []
        if not passes and mistake.words not in found:
            keep(path, found := [*found, mistake.words])
    file.write_text(whole, encoding="utf-8")
    if not path.endswith(".py") and not cpp_mistakes.build_changed(tree, objects, path, isa):
        raise SystemExit("mutants: the extension must build")
    return left


def known_of(path: str) -> list[str]:
    """The mistakes in this state of a file that were found before."""
    return [str(words) for words in kept().get(state_of(path), [])]


def kept() -> dict[str, list[str]]:
    return dict(json.loads(KEPT.read_text(encoding="utf-8"))) if KEPT.exists() else {}


def keep(path: str, found: list[str]) -> None:
    """Write down which mistakes in a file were found; processes of other files do so, too."""
    KEPT.parent.mkdir(exist_ok=True)
    with (KEPT.parent / "mutants.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        KEPT.write_text(json.dumps({**kept(), state_of(path): found}, indent=1), encoding="utf-8")


def state_of(path: str) -> str:
    return f"{path} {hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]}"


def try_file(path: str, mistakes: list[Mistake]) -> tuple[list[Mistake], list[Mistake]]:
    """The mistakes in a file, and those that survive, in a copy of the tree."""
    tests = TESTS[path] if path in TESTS else list(cpp_mistakes.PARTS[path].tests)
    none = [mistake for mistake in mistakes if why_none(path, mistake)]
    tried = [mistake for mistake in mistakes if mistake not in none]
    if all(mistake.words in known_of(path) for mistake in tried):
        return mistakes, none
    with tempfile.TemporaryDirectory() as folder:
        tree, objects = Path(folder) / "tree", Path(folder) / "objects"
        objects.mkdir()
        copy_tree(tree)
        if not path.endswith(".py") and cpp_mistakes.PARTS[path].objects:
            cpp_mistakes.build_all(tree, objects, ROOT / "build")
        if not run_tests(tree, tests):
            raise SystemExit(f"mutants: {' '.join(tests)} must pass on the code as it is")
        if path.endswith(".py") and survivors_of(tree, path, [Mistake("an empty file", "")], tests, objects):
            raise SystemExit(f"mutants: {' '.join(tests)} must use {path}")
        return mistakes, none + survivors_of(tree, path, tried, tests, objects)


def why_none(path: str, mistake: Mistake) -> str:
    """Why a change is no mistake, or an empty string."""
    return EQUIVALENT.get(f"{path}: {mistake.words.split(' -> ')[1]}", "")


def chosen(path: str, each: int, seed: int) -> list[Mistake]:
    """The mistakes that are made in a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".py"):
        every = mistakes_of(text)
        return random.Random(f"{seed} {path}").sample(every, min(each, len(every)))
    made = []
    for file, right, wrong in cpp_mistakes.CPP:
        if file == path:
            if text.count(right) != 1:
                raise SystemExit(f"mutants: {path} must hold {right!r} once")
            made.append(Mistake(f"{on_line(right)} -> {on_line(wrong)}", text.replace(right, wrong)))
    return made


def on_line(text: str) -> str:
    """Some lines of code on one line."""
    return " ".join(text.split()) or "nothing"


def table(results: dict[str, tuple[int, list[Mistake]]]) -> str:
    rows = ["| part | mistakes | found | share |", "|---|---:|---:|---:|"]
    left, made = [], 0
    for path, (count, survived) in results.items():
        none = sum(bool(why_none(path, each)) for each in survived)
        count, made = count - none, made + count - none
        unknown = [each for each in survived if not why_none(path, each)]
        rows.append(f"| `{path}` | {count} | {count - len(unknown)} | {1 - len(unknown) / count:.0%} |")
        left += [(path, each, why_none(path, each)) for each in survived]
    survived = sum(not why for _, _, why in left)
    lines = [f"{made} mistakes, {made - survived} found: {1 - survived / made:.0%}.", "", *rows, ""]
    lines += [f"- `{path}`: `{each.words}`" + (f" (no mistake: {why})" if why else "") for path, each, why in left]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=10, help="mistakes of a Python file")
    parser.add_argument("--cpp", action="store_true", help="those in C++ (each builds the extension anew)")
    parser.add_argument("--jobs", type=int, default=2, help="files at once")
    parser.add_argument("--only", nargs="*", help="files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="also those that were found before")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/trust.md")
    options = parser.parse_args()
    paths = options.only or ([*cpp_mistakes.PARTS] if options.cpp else [*TESTS])
    if options.again:
        KEPT.unlink(missing_ok=True)
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    with multiprocessing.get_context("fork").Pool(1 if options.cpp else options.jobs) as pool:
        tried = pool.starmap(try_file, [(path, chosen(path, options.each, options.seed)) for path in paths], 1)
    results = {path: (len(mistakes), survived) for path, (mistakes, survived) in zip(paths, tried, strict=True)}
    text = table(results)
    print(text)
    if options.write:
        from den.support.tables import write_section

        write_section(PAGE, "mutants-cpp" if options.cpp else "mutants", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
