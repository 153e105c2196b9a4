"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check``.

Builds the extension and runs one problem of every kernel within a minute; where that fails nothing else runs. Then it
measures the machine's ceilings, checks every op against float64, proves that nothing waits for the device and that
graphs, compilation and export work, times convolutions, blocks, networks and a training step against the best dense
baseline and the floors, and asks ncu what bounds the kernels; what time is left goes to dense networks whose kernels
are searched for and to compute-sanitizer (`--only sanitize` for itself). Results go to benchmarks/results/<gpu>.json
after every step, a table to stdout, its last lines the most important ones. Exit status: 0, 1 where a check failed, 2
without a GPU. `--rehearse` runs all of it without one, on a simulated GPU (rehearsal.py), and keeps nothing.

The file: {"format": 1, "gpu", "rates": measured FLOP/s and bytes/s by name, "targets": [{"what", "bound", "measured",
"met"}], "steps": {step: {"seconds", "commit", "cases": [row]}}}. A row has "case", "status" (ok, failed, skipped),
"seconds", and "error" or "reason" or what was measured; of a timed case "providers": {name: {"median" in seconds,
"floor", "flops_ratio", "dense_share" of the best dense time, "realised" fraction, "graph"}}; in a rehearsal "computed",
by what.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, the packages may not be
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"] + [str(ROOT)]
    __package__ = "benchmarks"

import torch  # noqa: E402

from benchmarks import (  # noqa: E402
    gpu_blocks,
    gpu_composition,
    gpu_correctness,
    gpu_machine,
    gpu_networks,
    gpu_pool,
    gpu_profile,
    gpu_proofs,
    gpu_sanitize,
    gpu_smoke,
    gpu_table,
    gpu_times,
    gpu_tuning,
    rehearsal,
)
from benchmarks.gpu_worker import Check, Context, work  # noqa: E402
from den.support.terminal import ended  # noqa: E402

FORMAT = 1
CHECK = 180.0  # seconds after which a single check counts as hung: compiling 60 kernels takes more than a minute
RESULTS = ROOT / "benchmarks" / "results"


def correctness(context: Context) -> list[Check]:
    """Ops in every dtype."""
    return [*gpu_correctness.checks(context), *gpu_blocks.checks(context), *gpu_composition.checks(context)]


def timed(context: Context) -> list[Check]:
    """All timings, for their kernels to be compiled beforehand."""
    lists = (gpu_times.convolution_checks, gpu_times.block_checks, gpu_networks.inference_checks)
    return [check for checks in (*lists, gpu_networks.training_checks) for check in checks(context)]


def autotuned(context: Context) -> list[Check]:
    """Network and blocks once more, against dense ones whose kernels torch.compile searches for, which takes long."""
    mode = gpu_times.TUNED
    networks = [] if context.tiny else gpu_networks.inference_checks(context, mode)
    return [*networks, *gpu_times.block_checks(context, mode)]


class Step(NamedTuple):
    """A part of the run, in processes of its own."""

    checks: Callable[[Context], list[Check]]
    seconds: float = CHECK  # that it may take at most
    workers: int = 1  # at a time; more than one only where nothing is timed
    warm: bool = False


STEPS = {
    "build": Step(gpu_machine.build_checks),
    "smoke": Step(gpu_smoke.checks, 60, workers=4),
    "machine": Step(gpu_machine.checks),
    "correctness": Step(correctness, workers=12),
    "proofs": Step(gpu_proofs.checks, workers=6),
    "compile": Step(timed, workers=12, warm=True),
    "convolutions": Step(gpu_times.convolution_checks),
    "network": Step(gpu_networks.inference_checks),
    "blocks": Step(gpu_times.block_checks),
    "training": Step(gpu_networks.training_checks),
    "profile": Step(gpu_profile.checks, 60),
    "autotuned": Step(autotuned, 240),
    "sanitize": Step(gpu_sanitize.checks, 400, workers=2),
}
FIRST = ("build", "smoke")  # whatever else is asked for


def slug(gpu: str) -> str:
    """The name of the results file.

    >>> slug("NVIDIA H200"), slug("NVIDIA GeForce RTX 4090 (x2)")
    ('nvidia-h200', 'nvidia-geforce-rtx-4090-x2')
    """
    return "-".join(re.findall(r"[a-z0-9]+", gpu.lower()))


def new_document(gpu: str) -> dict[str, Any]:
    """Results without a step."""
    return {"format": FORMAT, "gpu": gpu, "rates": {}, "targets": [], "steps": {}}


def load(path: Path, gpu: str) -> dict[str, Any]:
    """What an earlier run kept; a new document where there is none of this format and GPU."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return new_document(gpu)
    same = isinstance(document, dict) and (document.get("format"), document.get("gpu")) == (FORMAT, gpu)
    return document if same else new_document(gpu)


def keep(document: dict[str, Any], path: Path) -> None:
    """Work out the targets and write the file, whole or not at all."""
    rows = {row["case"]: row for step in document["steps"].values() for row in step["cases"] if not row.get("warm")}
    document["targets"] = [target.line(rows) for target in gpu_table.TARGETS]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def run_steps(names: Sequence[str], document: dict[str, Any], path: Path, options: argparse.Namespace) -> bool:
    """Every step within its limit, results kept after each, tuning before what is timed; whether all checks passed.

    Nothing runs behind a smoke that fails or is not done in time.
    """
    end, passed = time.monotonic() + options.budget, True
    for name in names:
        begin = time.monotonic()
        rows = run_step(name, document, end - begin, options)
        passed = passed and not any(row["status"] == "failed" for row in rows)
        keep(document, path)
        print(f"== {name}: {time.monotonic() - begin:.1f} s, {end - time.monotonic():.0f} s left", flush=True)
        if name == "smoke" and any(row["status"] == "failed" for row in rows):
            print("== the smoke failed: nothing else runs", flush=True)
            return False
        if name == "smoke" and options.tune:
            document["steps"]["tune"] = gpu_tuning.run(options.tune, context_of(options), options.out)
            passed = passed and not any(row["status"] == "failed" for row in document["steps"]["tune"]["cases"])
            end += options.tune
            keep(document, path)
    return passed


def run_step(name: str, document: dict[str, Any], left: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of a step, which are also put into the document. A smoke that is not done in time has failed."""
    step, begin = STEPS[name], time.monotonic()
    try:
        context = dataclasses.replace(context_of(options), warm=step.warm, rates=document["rates"])
        checks = [check.name for check in step.checks(context)]
        most = 2 if options.rehearse else 1 if options.tiny else step.workers
        rows = gpu_pool.run(name, checks, context, min(left, step.seconds), CHECK, min(most, step.workers))
    except Exception as error:  # a step that cannot even be listed must not lose the others
        rows = [gpu_pool.failure(name, f"{type(error).__name__}: {error}")]
    if name == "smoke":
        rows = [
            gpu_pool.failure(row["case"], row["reason"])
            if row.get("reason", "").startswith(gpu_pool.OUT_OF_TIME)
            else row
            for row in rows
        ]
    seconds = round(time.monotonic() - begin, 1)
    document["steps"][name] = {"seconds": seconds, "commit": gpu_machine.commit()["commit"], "cases": rows}
    if name == "machine":
        document["rates"] = gpu_machine.rates(rows)
    return rows


def context_of(options: argparse.Namespace) -> Context:
    """Where and how large, as the command line says."""
    compiles = options.rehearse or not options.tiny
    return Context(options.device, options.tiny, 0.4, compiles, options.rehearse)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="these steps; what is kept of the others stays")
    parser.add_argument(
        "--budget", type=float, default=480.0, help="seconds; what does not fit is skipped, and said so"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS", help="tune the launches after the smoke")
    parser.add_argument("--device", default="cuda", help="cpu: exercise the script itself, times mean nothing")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument(
        "--rehearse", action="store_true", help="all of it on a simulated GPU, tiny; no results are kept"
    )
    parser.add_argument("--worker", nargs=4, metavar=("STEP", "CONTEXT", "SHARE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def as_worker(step: str, context: str, share: str, file: str) -> int:
    """Run a worker's share of a step."""
    given = Context.of_text(context)
    first, count = (int(part) for part in share.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))  # references run on the CPU, in every worker
    checks = gpu_tuning.checks(given) if step == "tune" else STEPS[step].checks(given)
    if given.rehearse:
        return rehearsal.rehearse(checks, given, Path(file), (first, count))
    if given.is_cuda:
        torch.cuda.set_device(given.place)
    return work(checks, given, Path(file), (first, count))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    options = parse(arguments)
    if options.worker:
        return as_worker(*options.worker)
    if options.rehearse:
        return rehearse(options)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check: a CUDA device is needed, torch finds none", file=sys.stderr)
        return 2
    return run(options, torch.cuda.get_device_name(options.device) if options.device != "cpu" else "no GPU")


def rehearse(options: argparse.Namespace) -> int:
    """Everything on a simulated GPU; results go to `--out`, or nowhere, but never among those that were measured."""
    if options.out and options.out.resolve().is_relative_to(RESULTS):
        print(
            f"gpu_check: --out must be outside {RESULTS} where --rehearse is given, got {options.out}", file=sys.stderr
        )
        return 2
    options.device, options.tiny, options.tune = "cuda:0", True, options.tune or 5.0
    with tempfile.TemporaryDirectory() as folder:
        options.out = options.out or Path(folder)  # which is removed
        with mock.patch.dict(os.environ, rehearsal.environment(Path(folder))):
            return run(options, "rehearsal")


def run(options: argparse.Namespace, gpu: str) -> int:
    """All steps that are asked for and the report; the exit status."""
    options.out = options.out or RESULTS
    path = options.out / f"{slug(gpu)}.json"
    document = load(path, gpu) if options.only else new_document(gpu)
    names = [name for name in STEPS if name in FIRST or name in (options.only or STEPS)]
    passed = run_steps(names, document, path, options)
    print(gpu_table.render(document))
    print(f"written: {path}", flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(ended(main))
