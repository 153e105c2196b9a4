"""What bounds the kernels, as Nsight Compute sees it, each case in a process of its own (tests/profiled.py)."""

import csv
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.gpu_ways import Unavailable
from tests.on_gpu import ROOT, Context, environment, find_program
from tests.profiled import SHAPES

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
# What is kept: names differ between architectures in their middle.
KEPT = {
    "time": ("gpu__time_duration.sum", ""), "tensor pipe": ("pipe_tensor", "pct"), "L2": ("lts__t", "pct"),
    "memory": ("dram__throughput", "pct"), "stalls": ("issue_stalled", ".ratio"),
}  # fmt: skip
REFUSED = ("ERR_NVGPUCTRPERM", "not supported", "Unsupported")  # no permission for counters; no such GPU or driver
STALLS = 4  # the largest ones are kept


@pytest.mark.profiler
@pytest.mark.parametrize("case", [*(f"fused {shape}" for shape in SHAPES), "composition 64x32x32"])
def test_profile(case: str, context: Context, record: Any) -> None:
    """The fused kernel in three shapes, and the two convolutions of the first."""
    record(profile(case, context))


def profile(name: str, context: Context) -> dict[str, Any]:
    """What ncu measures of every launch, in order; of a composition the last two are conv1 and conv2."""
    program = find_program("ncu", context)
    sections = [part for section in SECTIONS for part in ("--section", section)]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
    run = [sys.executable, "-m", "tests.profiled", name, context.device, str(int(context.tiny))]
    done = subprocess.run([program, *options, *run], cwd=ROOT, env=environment(), capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    refused = next((line for line in lines if line.startswith("==ERROR==") and any(x in line for x in REFUSED)), None)
    refused = refused or next((line for line in lines if line.startswith("left out: ")), None)
    if refused:
        raise Unavailable(refused[:200])
    assert done.returncode == 0, f"ncu ended with {done.returncode}: {' | '.join(lines[-5:])[:500]}"
    launches = parse(done.stdout)
    wanted = 1 if name.startswith("fused") else 2
    assert len(launches) >= wanted, (
        f"ncu saw {len(launches)} launches, {wanted} were made: {' | '.join(lines[-5:])[:500]}"
    )
    if wanted == 2:
        launches[-2]["part"], launches[-1]["part"] = "conv1", "conv2"
    return {"launches": launches}


def parse(text: str) -> list[dict[str, Any]]:
    """The launches in a table that ncu prints as CSV: a line of names, a line of units, a line for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        return []
    names, units, *rows = csv.reader(lines)
    launches = []
    for row in rows:
        values = {name: (value, unit) for name, value, unit in zip(names, row, units, strict=False)}
        launches.append({"kernel": values["Kernel Name"][0]} | kept(values))
    return launches


def kept(values: dict[str, tuple[str, str]]) -> dict[str, dict[str, str]]:
    """The measures of `KEPT`, with their units; of the stalls the largest.

    >>> kept({"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("41.5", "%"), "Grid Size": ("9", "")})
    {'tensor pipe': {'sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active': '41.5 %'}}
    """
    found = {}
    for what, (part, end) in KEPT.items():
        chosen = {name: pair for name, pair in values.items() if part in name and end in name}
        if what == "stalls":
            largest = sorted(chosen, key=lambda name: -number(chosen[name][0]))[:STALLS]
            chosen = {name: chosen[name] for name in largest}
        if chosen:
            found[what] = {name: " ".join(pair).strip() for name, pair in chosen.items()}
    return found


def number(text: str) -> float:
    """A number as ncu writes it, 0 where there is none.

    >>> number("1,234.5"), number("n/a")
    (1234.5, 0.0)
    """
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0
