"""`den bench`: the benchmarks of a checkout, measured on this machine, as a table, Markdown and figures."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from den.support.files import check_folder, check_own, is_writable
from den.support.limits import Range, check_ranges

# The folder comes last on the path: an installed den_kernels is measured, not its sources without an extension.
PROGRAM = """import runpy, sys
sys.path.append(".")
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""
RESULTS = Path("benchmarks/results")
NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}


@dataclass(frozen=True)
class BenchConfig:
    """Measure what dynamic inference buys here, with the benchmarks of the checkout in the current folder."""

    select: str = ""
    """Only cases whose names match, as pytest's -k: "residual and uniform"."""
    marker: str = ""
    """Only cases of a marker, as pytest's -m: op, network, training, latency, memory."""
    provider: tuple[str, ...] = ()
    """Time only these beside ours."""
    all_cases: bool = False
    """Also the cases that add little: several times as long."""
    case_seconds: Annotated[float, Range(0)] = 0.7
    """Time to spend on the rounds of a case."""
    out: Path = Path("runs/bench")
    """Folder for the measurements, the tables and the figures."""
    read: Path | None = None
    """Measure nothing; report this JSON of an earlier run."""
    keep: bool = False
    """Also replace these cases in the checkout's benchmarks/results/<machine>.json."""


def main(config: BenchConfig) -> int:
    """Measure and report; the exit status of what failed first, 0 if nothing did.

    Raises ValueError, before anything is measured: outside a checkout, for values that mean nothing, where pytest or
    pytest-benchmark is missing or a folder cannot be written to.
    """
    check_ranges(config, "bench")
    if not Path("benchmarks/report.py").is_file():
        raise ValueError(
            "bench: current folder must be a checkout of the project, which holds benchmarks/, got "
            f"{Path.cwd()}; clone the repository and run den bench in it"
        )
    if config.read is not None and not config.read.is_file():
        raise ValueError(f"bench: read must be a JSON file of an earlier run, got {config.read}")
    if config.keep and not is_writable(RESULTS):
        raise ValueError(f"bench: {RESULTS} must be writable to keep results there")
    run, status = config.read or config.out / "run.json", 0
    if config.read is None:
        missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
        if missing:
            raise ValueError(f"bench: {' and '.join(missing)} must be installed; pip install {' '.join(missing)}")
        check_folder(config.out, "bench: out")
        check_own(run, '"machine_info"', "bench: out")
        run.unlink(missing_ok=True)
        status = _python(measure_arguments(config, run))
        if not run.is_file():  # nothing was selected, or pytest did not get that far
            return status or 1
    reported = _python(report_arguments(config, run))
    return status or reported


def measure_arguments(config: BenchConfig, run: Path) -> list[str]:
    """pytest's command line."""
    arguments = ["pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={run}"]
    arguments += ["-k", config.select] if config.select else []
    arguments += ["-m", config.marker] if config.marker else []
    arguments += [f"--provider={name}" for name in config.provider]
    arguments += ["--all-cases"] if config.all_cases else []
    return [*arguments, f"--case-seconds={config.case_seconds}"]


def report_arguments(config: BenchConfig, run: Path) -> list[str]:
    """The report's command line."""
    return ["benchmarks.report", str(run), f"--out={config.out}", *(["--keep"] if config.keep else [])]


def _python(arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=False).returncode
