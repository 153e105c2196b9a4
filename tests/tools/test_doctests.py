"""Examples in docstrings, of every module that has some."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import den
import den_kernels

MODULES = [
    ".".join(path.relative_to(Path(package.__file__).parents[1]).with_suffix("").parts)
    for package in (den_kernels, den)
    for path in sorted(Path(package.__file__).parent.rglob("*.py"))
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
    assert {"den_kernels._cuda_layout", "den_kernels._triton.choice"} <= set(MODULES)
