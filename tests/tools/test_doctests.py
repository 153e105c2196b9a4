"""Examples in docstrings, of every module that has some."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import den
import den_kernels

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [*(Path(package.__file__).parent for package in (den_kernels, den)), ROOT / "benchmarks", ROOT / "tests/gpu"]
MODULES = [
    ".".join([*(["tests"] if folder.name == "gpu" else []), *path.relative_to(folder.parent).with_suffix("").parts])
    for folder in FOLDERS
    for path in sorted(folder.rglob("*.py"))
    if ">>> " in path.read_text()
]
KERNELS = ("den_kernels._triton.",)  # import triton where they are imported


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.startswith(KERNELS):
        pytest.importorskip("triton", reason="triton is not installed")
    found = doctest.testmod(import_module(name.removesuffix(".__init__")), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


def test_there_are_examples():
    assert {
        "den_kernels._cuda_layout",
        "den_kernels._triton.choice",
        "benchmarks.shapes",
        "tests.gpu.test_profiler",
    } <= set(MODULES)
