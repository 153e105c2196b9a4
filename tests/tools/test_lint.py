"""Linters as tests: ruff, clang-format and mypy, each in the release that the extra `dev` pins."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(
    requirement.split("==")
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    if "==" in requirement
)


def run(tool: str, *arguments: str) -> None:
    """Run a linter on the checkout; fail with all that it says, or skip where it is not the pinned one."""
    try:
        found = version(tool)
    except PackageNotFoundError:
        found = "none"
    if found != PINS[tool]:
        pytest.skip(f"{tool} must be {PINS[tool]} (pip install '.[dev]'), got {found}")
    command = [str(Path(sys.executable).parent / tool), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    run("ruff", "check", "--no-fix", ".")


def test_files_are_formatted():
    run("ruff", "format", "--check", ".")


def test_c_is_formatted():
    sources = sorted(str(path) for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    run("clang-format", "--dry-run", "-Werror", *sources)


def test_types_are_right():
    known = re.search(r"^torch==(\d+\.\d+)", (ROOT / ".ci/constraints.txt").read_text(), re.MULTILINE)[1]
    if not torch.__version__.startswith(f"{known}."):
        pytest.skip(f"types are checked against torch {known}, whose annotations differ from those of other releases")
    run("mypy")


@pytest.mark.parametrize(
    "folder",
    [
        "benchmarks",
        "den",
        "den/dag",
        "den/data",
        "den/evaluate",
        "den/nn",
        "den/nn/blocks",
        "den/recipes",
        "den/recipes/dag",
        "den/report",
        "den/report/dag",
        "den/report/figures",
        "den/runs",
        "den/serve",
        "den/support",
        "den/train",
        "den_kernels",
        "den_kernels/_triton",
        "scripts",
    ],
)
def test_docstrings_begin_with_a_verb_or_the_thing(folder):
    """Not with "What ..." or "Whether ...": CONTRIBUTING.md, style."""
    found = []
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").split(maxsplit=1)[:1]
                if first and first[0] in ("What", "Whatever", "Whether", "How"):
                    found.append(f"{path.name}: {getattr(node, 'name', 'module')}")
    assert found == []


def test_hooks_run_the_same_tools():
    """The hooks of a commit are the linters of the extra `dev`, and bring none of their own."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = {entry.split()[0] for entry in re.findall(r"entry: (.+)", text)}
    assert entries == set(PINS)
    assert set(re.findall(r"repo: (\S+)", text)) == {"local"}
