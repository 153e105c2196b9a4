"""`pip install .` where no nvcc is found: one line says so, and the CPU path works.

sitecustomize.py is imported by every Python process that has its folder on PYTHONPATH: by it the build sees no nvcc,
wherever on this machine one lies.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="pybind11 is not installed")
# Not imported: it takes the distutils of Python's own library before setuptools can put its own there.
has_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")


def marked_release(test):
    """A test that the package is built for, which takes a minute or two."""
    return pytest.mark.release(has_pip(test))


ROOT = Path(__file__).parents[2]
NO_NVCC = """
import os
access = os.access
os.access = lambda path, *rest, **named: not str(path).endswith("nvcc") and access(path, *rest, **named)
"""
COMPILER = """#!/bin/sh
# Makes what -o names, empty.
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
CHECK = """
from den_kernels import _C, info
print(_C.__file__)
assert not info.describe()["extension"]["with_cuda"], info.describe()["extension"]
"""


def python(*command: str, cwd: Path, path: Path, **variables: str) -> str:
    """Output of a Python process that finds packages in `path`, and none in its working directory."""
    environment = {name: value for name, value in os.environ.items() if name != "DEN_KERNELS_CUDA"}
    environment |= {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **variables}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, **streams)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A folder with a copy of this source tree, and one that hides nvcc from Python processes."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "hidden").mkdir()
    (folder / "hidden/sitecustomize.py").write_text(NO_NVCC)
    for name in ("csrc", "den", "den_kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / "source")
    return folder


@pytest.mark.slow
def test_what_is_compiled_without_nvcc(copied):
    """All C++ and no CUDA, and one line that says so; by a compiler that compiles nothing."""
    compiler = copied / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    tools = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(compiler))
    command = ["setup.py", "build_ext", "--build-temp", "objects", "--build-lib", "library"]
    printed = python(*command, cwd=copied / "source", path=copied / "hidden", **tools)
    assert_says_so(printed)
    compiled = {path.stem for path in (copied / "source/objects").rglob("*.o")}
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*.cpp")}
    included = [name for text in sources.values() for name in re.findall(r'#include "(\w+)\.cpp"', text)]
    assert sorted([*compiled, *included]) == sorted(sources)  # each once


def assert_says_so(printed: str) -> None:
    lines = [line.strip() for line in printed.splitlines() if "den_kernels: " in line]
    assert len(lines) == 1, printed
    assert lines[0].startswith("den_kernels: no nvcc found, building without CUDA")


@pytest.fixture(scope="module")
def installed(copied) -> tuple[Path, str]:
    """The folder that pip installed the package into, and what it printed."""
    folder = copied
    flags = "-v --no-index --no-deps --no-build-isolation --disable-pip-version-check --target"
    command = ["-m", "pip", "install", *flags.split(), str(folder / "site"), "."]
    return folder / "site", python(*command, cwd=folder / "source", path=folder / "hidden")


@marked_release
def test_one_line_says_that_cuda_is_left_out(installed):
    assert_says_so(installed[1])


@marked_release
def test_the_extension_has_no_cuda(installed):
    site, _ = installed
    where = python("-c", CHECK, cwd=site.parent, path=site)
    assert Path(where.splitlines()[-1]).is_relative_to(site)


@marked_release
def test_the_cpu_path_passes_its_tests(installed, tmp_path):
    """All that den_kernels does on a CPU, of the package that was installed, by this repository's tests."""
    site, _ = installed
    ops = "rows plan dynamic_conv dynamic_conv_grad conv_direct dynamic_norm dynamic_norm_calls"
    ops += " dynamic_residual dynamic_residual_calls dynamic_graph layers"
    files = [f"tests/kernels/test_{name}.py" for name in ops.split()]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "base"), *files]
    done = python(*command, "-k", "not (opcheck or compile or export)", "-m", "not slow", cwd=ROOT, path=site)
    assert re.search(r"\d+ passed", done), done
