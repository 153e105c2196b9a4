#!/usr/bin/env python3
"""Kills one training run again and again (kill -9), continues it each time, and compares it with one that lived.

    scripts/kills.py [--kills 20] [--seed 0] [--write]

Both are `den train` on a CPU, of the handwritten digits, with all kinds of phases.  A kill comes a random moment after
a random update of each phase in turn; every fourth while the file of a checkpoint is being written.  At the end every
tensor, record and line of metrics has to be the same to the bit.  --write puts the table into docs/results/trust.md.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from den.support.files import PARTIAL
from den.support.tables import markdown_table, write_section
from den.train.checkpoint import load_checkpoint, read_updates
from den.train.folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/trust.md"
PHASES = {  # updates of each, in order
    "estimator, stage 1": 30, "selector, stage 1": 20, "estimator, stage 2": 25, "selector, stage 2": 20, "finish": 25,
}  # fmt: skip
SETTINGS = [
    "--data.tasks", "digits", "--data.batch-size", "32", "--share", "0.2", "--data.validation", "0.1",
    "--network.backbone", "wrn14_2", "--network.trunk-size", "8", "--stages", "2", "--epoch-steps", "2",
    "--device", "cpu", "--no-progress", "--estimator.first.steps", "30", "--estimator.later.steps", "25",
    "--estimator.finish.steps", "25", "--selector.phase.steps", "20",
]  # fmt: skip


@dataclass
class Kill:
    """A kill: when it was to come, and what it met."""

    phase: str
    updates: int  # of the checkpoint after which it comes
    wait: float  # seconds after that
    in_checkpoint: bool  # it comes while the next file of a checkpoint is written
    partial: bool = False  # the unfinished file lay there afterwards
    kept: int = 0  # updates of the checkpoint from which the run continued


def planned(count: int, seed: int) -> list[Kill]:
    """Kills at random updates of each phase in turn, in the order of the run."""
    draws, kills = random.Random(seed), []
    starts = [sum(list(PHASES.values())[:i]) for i in range(len(PHASES))]
    for i in range(count):
        phase, start = list(PHASES)[i % len(PHASES)], starts[i % len(PHASES)]
        updates = start + draws.randrange(0, PHASES[phase] - 4)
        kills.append(Kill(phase, updates, draws.uniform(0, 0.1), i // len(PHASES) % 4 == 3))
    return sorted(kills, key=lambda kill: kill.updates)


def start(out: Path) -> subprocess.Popen[bytes]:
    """Start a run, or continue it, in a process of its own."""
    resume = ["--resume"] if (out / "last.safetensors").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "den", "train", "--out", str(out), *SETTINGS, *resume]
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(command, env=environment, cwd=out.parent, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes], out: Path, moment: Kill) -> None:
    """Kill the run at a moment; RuntimeError if it ends before."""
    last = out / "last.safetensors"
    wait_until(process, lambda: last.exists() and read_updates(last) >= moment.updates)
    if moment.in_checkpoint:
        partial = last.with_name(last.name + PARTIAL)
        wait_until(process, partial.exists, pause=0)
    else:
        time.sleep(moment.wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    moment.partial = any(out.glob(f"*{PARTIAL}"))
    moment.kept = read_updates(last)


def wait_until(process: subprocess.Popen[bytes], met: object, pause: float = 0.002) -> None:
    assert callable(met)
    while not met():
        if process.poll() is not None:
            raise RuntimeError(f"kills: the run ended by itself, with status {process.returncode}")
        time.sleep(pause)


def differences(whole: Path, killed: Path) -> list[str]:
    """List what differs between two finished runs."""
    found = [] if read_metrics(whole) == read_metrics(killed) else ["metrics"]
    for name in ("last", "best"):
        (expected, record), (tensors, again) = (load_checkpoint(k / f"{name}.safetensors") for k in (whole, killed))
        found += [] if record == again else [f"record of {name}"]
        same = expected.keys() == tensors.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
        found += [] if same else [f"tensors of {name}"]
    return found


def table(kills: list[Kill], differ: list[str], updates: int, seconds: float) -> str:
    head, rows = ("kill", "phase", "after update", "killed", "unfinished file left", "continued from"), []
    for i, each in enumerate(kills, 1):
        when = "in a checkpoint" if each.in_checkpoint else f"{each.wait * 1e3:.0f} ms later"
        left = "yes" if each.partial else "no"
        rows.append([str(i), each.phase, str(each.updates), when, left, str(each.kept)])
    verdict = f"**different: {', '.join(differ)}**" if differ else "the same to the bit"
    inside = sum(each.partial for each in kills)
    return (
        f"{len(kills)} kills in a run of {updates} updates, {inside} of them with a checkpoint half written. "
        f"Weights, optimisers, generators, records and metrics at the end: {verdict} ({seconds:.0f} s; "
        f"torch {torch.__version__}).\n\n{markdown_table(head, rows)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/trust.md")
    options = parser.parse_args()
    begun, kills = time.perf_counter(), planned(options.kills, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        if start(whole).wait():
            raise SystemExit((whole.parent / "whole.log").read_text(encoding="utf-8"))
        for i, moment in enumerate(kills, 1):
            kill(start(killed), killed, moment)
            print(f"kill {i} of {len(kills)}: {moment}", flush=True)
        if start(killed).wait():
            raise SystemExit((killed.parent / "killed.log").read_text(encoding="utf-8"))
        differ = differences(whole, killed)
        text = table(kills, differ, read_updates(killed / "last.safetensors"), time.perf_counter() - begun)
    print(text)
    if options.write:
        write_section(PAGE, "kills", text)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
