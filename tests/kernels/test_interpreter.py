"""The GPU kernels' values, on a machine without a GPU: Triton's interpreter runs them on CPU tensors.

The interpreter is chosen when triton is imported and changes it, so the files of tests/kernels/interpreter run in
processes of their own, a few in each: to import triton and torch takes as long as most files.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
FILES = sorted(str(path) for path in (Path(__file__).parent / "interpreter").glob("test_*.py"))
PROCESSES = 2


@pytest.mark.slow
@pytest.mark.parametrize("share", range(PROCESSES))
def test_kernels_compute_what_the_reference_does(share: int, pytestconfig: pytest.Config) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES[share::PROCESSES]]
    if pytestconfig.getoption("--release"):
        command.append("--release")
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
