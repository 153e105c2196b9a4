"""The CUDA kernels under compute-sanitizer, each tool in a process of its own (tests/sanitized.py)."""

import subprocess
import sys
from typing import Any

import pytest

from benchmarks.gpu_ways import Unavailable
from tests.on_gpu import ROOT, Context, environment, find_program

FOUND = 9  # exit status of a tool that found an error
NO_DEVICE = "Device not supported"  # said where the tool is older than the GPU, or may not debug it


@pytest.mark.tool
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str, context: Context, record: Any) -> None:
    record(sanitize(tool, context))


def sanitize(tool: str, context: Context) -> dict[str, Any]:
    """Run the kernels under a tool: what it says in the end, an AssertionError where it found something."""
    program = find_program("compute-sanitizer", context)
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5", sys.executable]
    run = [*command, "-m", "tests.sanitized", context.device]
    done = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "no summary")
    refused = next((line for line in lines if NO_DEVICE in line), None)
    if done.returncode and refused:
        raise Unavailable(f"compute-sanitizer: {refused.strip('= ')}")
    assert done.returncode == 0, f"{tool} ended with {done.returncode}: {' | '.join(lines[:12])[:500]} | {summary}"
    assert any(line.startswith("kernels ran:") for line in lines), f"{tool}: the kernels did not run: {lines[-3:]}"
    return {"summary": summary, "ran": next(line for line in lines if line.startswith("kernels ran:"))}
