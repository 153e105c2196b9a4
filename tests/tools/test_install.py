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
pytestmark = [
    pytest.mark.slow,
    # Not imported: it takes the distutils of Python's own library before setuptools can put its own there.
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed"),
]
ROOT = Path(__file__).parents[2]
NO_NVCC = """
import os
access = os.access
os.access = lambda path, *rest, **named: not str(path).endswith("nvcc") and access(path, *rest, **named)
"""
CHECK = """
from den_kernels import _C, info
print(_C.__file__)
assert not info.describe()["extension"]["with_cuda"], info.describe()["extension"]
"""


def python(*command: str, cwd: Path, path: Path) -> str:
    """Output of a Python process that finds packages in `path`, and none in its working directory."""
    environment = {name: value for name, value in os.environ.items() if name != "DEN_KERNELS_CUDA"}
    environment |= {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, **streams)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, str]:
    """The folder that pip installed the package into, and what it printed."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "hidden").mkdir()
    (folder / "hidden/sitecustomize.py").write_text(NO_NVCC)
    for name in ("csrc", "den", "den_kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / "source")
    flags = "-v --no-index --no-deps --no-build-isolation --disable-pip-version-check --target"
    command = ["-m", "pip", "install", *flags.split(), str(folder / "site"), "."]
    return folder / "site", python(*command, cwd=folder / "source", path=folder / "hidden")


def test_one_line_says_that_cuda_is_left_out(installed):
    lines = [line.strip() for line in installed[1].splitlines() if "den_kernels: " in line]
    assert len(lines) == 1, installed[1]
    assert lines[0].startswith("den_kernels: no nvcc found, building without CUDA")
    assert "dynamic_residual.cu" not in installed[1]


def test_the_extension_has_no_cuda(installed):
    site, _ = installed
    where = python("-c", CHECK, cwd=site.parent, path=site)
    assert Path(where.splitlines()[-1]).is_relative_to(site)


def test_the_cpu_path_passes_its_tests(installed, tmp_path):
    """All that den_kernels does on a CPU, of the package that was installed, by this repository's tests."""
    site, _ = installed
    ops = "rows plan dynamic_conv dynamic_conv_grad conv_direct dynamic_norm dynamic_norm_calls"
    ops += " dynamic_residual dynamic_residual_calls dynamic_graph layers"
    files = [f"tests/kernels/test_{name}.py" for name in ops.split()]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "base"), *files]
    done = python(*command, "-k", "not (opcheck or compile or export)", "-m", "not slow", cwd=ROOT, path=site)
    assert re.search(r"\d+ passed", done), done
