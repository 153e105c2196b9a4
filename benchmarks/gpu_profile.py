"""What bounds the kernels, as Nsight Compute sees it: ``python -m benchmarks.gpu_check --only profile``.

Every problem runs in a process of its own, ``python -m benchmarks.gpu_profile PROBLEM DEVICE``, under ``ncu``, which
measures only what lies between the two calls of the CUDA profiler: one fused block, or the block as Triton launches.
"""

from __future__ import annotations

import csv
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from den_kernels import ResidualWeights
from den_kernels.plan import Route, as_route
from den_kernels.rows import pool_rows
from den_kernels.testing import make_levels

from .gpu_blocks import fold, fused_branch, random_block
from .gpu_composition import composition
from .gpu_worker import Check, Context, Unavailable, find_program

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"64x32x32": (64, 32), "128x16x16": (128, 16), "256x8x8": (256, 8)}  # channels and side of a map
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
# What is kept: names differ between architectures in their middle.
KEPT = {
    "time": ("gpu__time_duration.sum", ""), "tensor pipe": ("pipe_tensor", "pct"), "L2": ("lts__t", "pct"),
    "memory": ("dram__throughput", "pct"), "stalls": ("issue_stalled", ".ratio"),
}  # fmt: skip
REFUSED = ("ERR_NVGPUCTRPERM", "not supported", "Unsupported")  # no permission for counters; no such GPU or driver
STALLS = 4  # the largest ones are kept


def checks(context: Context) -> list[Check]:
    """The fused kernel in three shapes, and the two convolutions of the first."""
    names = [*(f"fused {shape}" for shape in SHAPES), "composition 64x32x32"]
    names = names[2:] if context.tiny else names
    return [Check(f"profile {name}", functools.partial(profile, name)) for name in names]


def profile(name: str, context: Context) -> dict[str, Any]:
    """What ncu measures of every launch, in order; of a composition the last two are conv1 and conv2."""
    program = find_program("ncu", context)
    sections = [part for section in SECTIONS for part in ("--section", section)]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
    run = [sys.executable, "-m", "benchmarks.gpu_profile", name, context.device, str(int(context.tiny))]
    done = subprocess.run([program, *options, *run], cwd=ROOT, capture_output=True, text=True)
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


def fused(x: Tensor, route: Route, weights: ResidualWeights) -> Tensor:
    """The block by the fused kernel. Raises Unavailable where it does not run."""
    out = pool_rows(x, weights.conv2.shape[0], weights.stride)
    fused_branch(x, out, route, weights)
    return out


WAYS: dict[str, Callable[[Tensor, Route, ResidualWeights], Tensor]] = {"fused": fused, "composition": composition}


@torch.inference_mode()
def main(name: str, device: str, tiny: str) -> int:
    """Run a problem three times, the last time measured: 256 images in bfloat16, all levels alike often."""
    torch.manual_seed(0)
    context = Context(device, tiny == "1")
    way, shape = name.split()
    channels, side, batch = (16, 6, 4) if context.tiny else (*SHAPES[shape], 256)
    groups = channels // 4, channels // 4, channels // 2
    weights = fold(random_block(channels, channels, groups, 1), torch.bfloat16, context.place)
    x = torch.randn(batch, channels, side, side, device=context.place).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    route = as_route(make_levels("uniform", batch, 3).to(context.place), 3, batch)
    try:
        for _ in range(2):
            WAYS[way](x, route, weights)
    except Unavailable as reason:
        print(f"left out: {reason}", flush=True)
        return 0
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    WAYS[way](x, route, weights)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
