"""The layers of pyproject.toml ([tool.importlinter]): imports run from above to below, never back."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="needs import-linter")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the packages of a folder."""
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import *; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_imports_run_from_above_to_below():
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout
    assert "0 broken" in found.stdout


def test_an_arrow_back_is_found(tmp_path):
    """Of the same sources, with one import more."""
    for name in ("den", "den_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "packed"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    engine = tmp_path / "den" / "train" / "engine.py"
    engine.write_text(engine.read_text(encoding="utf-8") + "\nimport den.recipes\n", encoding="utf-8")
    found = lint(tmp_path)
    assert found.returncode == 1
    assert "den.train.engine -> den.recipes" in found.stdout
