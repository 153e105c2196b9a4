"""Modules of the benchmarks that need a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def answer_of(module: str, *arguments: str) -> Any:
    """Run ``python -m MODULE ARGUMENTS`` on the packages of this process; what its last line says, as JSON.

    Raises RuntimeError with what it wrote to its standard error where it failed.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    root = Path(__file__).resolve().parent.parent
    packages = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(root)])}  # the same ones as here
    done = subprocess.run(command, env=packages, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
