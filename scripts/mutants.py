#!/usr/bin/env python3
"""Would the tests notice?  Runs the tests of a part on copies of the code, each with one mistake.

    scripts/mutants.py [--each 25 | --cpp] [--only den_kernels/plan.py ...] [--seed 0] [--write]

Mistakes in Python are drawn by the seed from all those that `mistakes.py` makes of a file; those in C++ are written by
hand (`CPP`).  Each runs in a process of its own: the tests fail, or take too long, or the mistake survives.  --write
puts the table and the survivors into docs/results/trust.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mistakes import Mistake, mistakes_of  # nothing of ours: the tests' processes import it anew

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/trust.md"
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
CPP_TESTS = ["tests/kernels/test_plan.py", "tests/kernels/test_conv_direct.py"]
CPP = [  # file, what stands there, the mistake
    ("csrc/plan.cpp", "level < 0 || level >", "level > 0 && level >"),
    ("csrc/plan.cpp", "level > static_cast<T>(G)) bad", "level >= static_cast<T>(G)) bad"),
    ("csrc/plan.cpp", "++offsets[G - levels[b] + 1]", "++offsets[levels[b] + 1]"),
    ("csrc/plan.cpp", "next[G - levels[b]]++", "next[G - levels[b]]"),
    ("csrc/plan.cpp", "masks[b * G + g] != 0", "masks[b * G + g] == 0"),
    ("csrc/plan.cpp", "words[b * W + g / 64] |=", "words[b * W] |="),
    ("csrc/plan.cpp", "levels[a] > levels[b] ? -1 : 1", "levels[a] < levels[b] ? -1 : 1"),
    ("csrc/plan.cpp", "x > y ? -1 : 1", "x < y ? -1 : 1"),
    ("csrc/plan.cpp", "c != 0 ? c < 0 : a < b", "c != 0 ? c < 0 : a > b"),
    ("csrc/plan.cpp", "compare(order[i - 1], order[i]) != 0", "compare(order[i - 1], order[i]) < -1"),
    ("csrc/plan.cpp", "std::min(N, first + kColumns)", "std::min(N, first + kColumns - 1)"),
    ("csrc/plan.cpp", "offsets + n * (G + 2)", "offsets + n * (G + 1)"),
    ("csrc/direct_channels.h", "mask[order[offsets[s]] * G + group]", "mask[offsets[s] * G + group]"),
    ("csrc/direct_channels.h", "group < G - s", "group <= G - s"),
    ("csrc/direct_channels.h", "ranges.back().first + ranges.back().width < first", "ranges.size() > 9999"),
    ("csrc/direct_channels.h", "((1u << piece.width) - 1) << piece.first % block", "((1u << piece.width) - 1)"),
    ("csrc/direct_channels.h", "close(channels);", "close(dead);"),
    ("csrc/direct_strips.h", "(limit + stride - 1) / stride", "(limit + stride - 1) / stride + 1"),
    ("csrc/direct_strips.h", "std::min(most, strips[part] - i * most)", "std::min(most, strips[part] - i * most - 1)"),
    ("csrc/conv_bands.h", "std::min(rows, p.Ho - row)", "rows"),
]  # fmt: skip
EQUIVALENT = {  # survivors that change no result, and why
    "csrc/direct_strips.h: (limit + stride - 1) / stride + 1": "only which rows share a tile: each tile finds its taps",
}
PRELOADED = [
    "numpy",
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "safetensors.torch",
    "hypothesis",
    "pytest",
    "tyro",
    "PIL.Image",
]


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

        os._exit(int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *tests])))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def built(tree: Path, objects: Path, changed: str | None) -> bool:
    """Build a tree's extension, of which one header or source was changed, without optimisation; True if it builds."""
    import pybind11

    sources = sorted((tree / "csrc").glob("*.cpp"))
    stale = [source for source in sources if changed is None or reads(source, Path(changed).name)]
    include = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"], capture_output=True, text=True
    ).stdout.strip()
    flags = ["-fPIC", "-O1", "-DNDEBUG", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-w"]
    flags += [f"-I{include}", f"-I{pybind11.get_include()}"]
    for source in stale:
        command = ["g++", "-c", *flags, str(source), "-o", str(objects / f"{source.stem}.o")]
        if subprocess.run(command, capture_output=True).returncode:
            return False
    library = next((tree / "den_kernels").glob("_C*.so"))
    library.unlink()  # a new file: processes may have the old one open
    link = ["g++", "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", *map(str, sorted(objects.glob("*.o")))]
    return subprocess.run([*link, "-o", str(library)], capture_output=True).returncode == 0


def reads(source: Path, name: str) -> bool:
    """True where a source is, or includes directly or not, the file of this name."""
    if source.name == name:
        return True
    included = re.findall(r'#include "([^"]+)"', source.read_text(encoding="utf-8"))
    return any((source.parent / each).exists() and reads(source.parent / each, name) for each in included)


def survivors_of(tree: Path, path: str, mistakes: list[Mistake], tests: list[str], objects: Path) -> list[Mistake]:
    """The mistakes in one file that its tests do not find."""
    file, found = tree / path, []
    whole = file.read_text(encoding="utf-8")
    for i, mistake in enumerate(mistakes, 1):
        file.write_text(mistake.text, encoding="utf-8")
        passes = (path.endswith(".py") or built(tree, objects, path)) and run_tests(tree, tests)
        found += [mistake] if passes else []
        print(f"{path} {i}/{len(mistakes)} {'SURVIVED' if passes else 'killed'}: {mistake.words}", flush=True)
    file.write_text(whole, encoding="utf-8")
    if path.endswith(".cpp") or path.endswith(".h"):
        built(tree, objects, path)
    return found


def try_file(path: str, mistakes: list[Mistake]) -> tuple[list[Mistake], list[Mistake]]:
    """The mistakes in a file, and those that survive, in a copy of the tree."""
    tests = TESTS.get(path, CPP_TESTS)
    with tempfile.TemporaryDirectory() as folder:
        tree, objects = Path(folder) / "tree", Path(folder) / "objects"
        objects.mkdir()
        copy_tree(tree)
        if not path.endswith(".py"):
            for made in ROOT.glob("build/temp*/csrc/*.o"):  # of `setup.py build_ext --inplace`, if it built this code
                shutil.copy2(made, objects)
            if not any(objects.iterdir()) and not built(tree, objects, None):
                raise SystemExit("mutants: the extension must build")
        if not run_tests(tree, tests):
            raise SystemExit(f"mutants: {' '.join(tests)} must pass on the code as it is")
        if path.endswith(".py") and survivors_of(tree, path, [Mistake("an empty file", "")], tests, objects):
            raise SystemExit(f"mutants: {' '.join(tests)} must use {path}")
        return mistakes, survivors_of(tree, path, mistakes, tests, objects)


def chosen(path: str, each: int, seed: int) -> list[Mistake]:
    """The mistakes that are made in a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".py"):
        every = mistakes_of(text)
        return random.Random(f"{seed} {path}").sample(every, min(each, len(every)))
    made = []
    for file, right, wrong in CPP:
        if file == path:
            if text.count(right) != 1:
                raise SystemExit(f"mutants: {path} must hold {right!r} once")
            made.append(Mistake(f"{right} -> {wrong}", text.replace(right, wrong)))
    return made


def table(results: dict[str, tuple[int, list[Mistake]]], seconds: float) -> str:
    rows = ["| part | mistakes | found | share |", "|---|---:|---:|---:|"]
    left, made = [], 0
    for path, (count, survived) in results.items():
        known = [each for each in survived if f"{path}: {each.words.split(' -> ')[1]}" in EQUIVALENT]
        count, made = count - len(known), made + count - len(known)
        unknown = [each for each in survived if each not in known]
        rows.append(f"| `{path}` | {count} | {count - len(unknown)} | {1 - len(unknown) / count:.0%} |")
        left += [(path, each, EQUIVALENT.get(f"{path}: {each.words.split(' -> ')[1]}", "")) for each in survived]
    survived = sum(not why for _, _, why in left)
    lines = [
        f"{made} mistakes, {made - survived} found: {1 - survived / made:.0%} ({seconds / 60:.0f} minutes).",
        "",
        *rows,
        "",
    ]
    lines += [f"- `{path}`: `{each.words}`" + (f" (no mistake: {why})" if why else "") for path, each, why in left]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=25, help="mistakes of a Python file")
    parser.add_argument("--cpp", action="store_true", help="those in C++ (each builds the extension anew)")
    parser.add_argument("--jobs", type=int, default=2, help="files at once")
    parser.add_argument("--only", nargs="*", help="files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/trust.md")
    options = parser.parse_args()
    paths = options.only or ([*dict.fromkeys(file for file, _, _ in CPP)] if options.cpp else [*TESTS])
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    begun = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(1 if options.cpp else options.jobs) as pool:
        tried = pool.starmap(try_file, [(path, chosen(path, options.each, options.seed)) for path in paths], 1)
    results = {path: (len(mistakes), survived) for path, (mistakes, survived) in zip(paths, tried, strict=True)}
    text = table(results, time.perf_counter() - begun)
    print(text)
    if options.write:
        from den.support.tables import with_section

        name = "mutants-cpp" if options.cpp else "mutants"
        page = with_section(PAGE.read_text(encoding="utf-8"), name, text, "mutants: docs/results/trust.md")
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
