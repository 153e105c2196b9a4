"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check``.

Builds the extension, measures the machine's ceilings, checks every op against float64, proves that nothing waits for
the device and that graphs, compilation and export work, and times convolutions, blocks, networks and a training step
against the best dense baseline and the floors; what time is left goes to dense networks whose kernels are searched for
and to compute-sanitizer (`--only sanitize` for itself). Results go to benchmarks/results/<gpu>.json after every step,
a table to stdout, its last lines the most important ones. Exit status: 0, 1 where a check failed, 2 without a GPU.

The file: {"format": 1, "gpu", "rates": measured FLOP/s and bytes/s by name, "targets": [{"what", "bound", "measured",
"met"}], "steps": {step: {"seconds", "commit", "cases": [row]}}}. A row has "case", "status" (ok, failed, skipped),
"seconds", and "error" or "reason" or what was measured; of a timed case "providers": {name: {"median" in seconds,
"floor", "flops_ratio", "dense_share" of the best dense time, "realised" fraction, "graph"}}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, the packages may not be
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"] + [str(ROOT)]
    __package__ = "benchmarks"

import torch  # noqa: E402

from benchmarks import (  # noqa: E402
    gpu_blocks,
    gpu_correctness,
    gpu_machine,
    gpu_networks,
    gpu_pool,
    gpu_proofs,
    gpu_sanitize,
    gpu_table,
    gpu_times,
    gpu_tuning,
)
from benchmarks.gpu_worker import Check, Context, work  # noqa: E402
from den.terminal import ended  # noqa: E402

FORMAT = 1
RESULTS = ROOT / "benchmarks" / "results"


def correctness(context: Context) -> list[Check]:
    """Ops in every dtype."""
    return [*gpu_correctness.checks(context), *gpu_blocks.checks(context)]


def timed(context: Context) -> list[Check]:
    """All timings, for their kernels to be compiled beforehand."""
    lists = (gpu_times.convolution_checks, gpu_times.block_checks, gpu_networks.inference_checks)
    return [check for checks in (*lists, gpu_networks.training_checks) for check in checks(context)]


def autotuned(context: Context) -> list[Check]:
    """Network and blocks once more, against dense ones whose kernels torch.compile searches for, which takes long."""
    mode = gpu_times.TUNED
    return [*gpu_networks.inference_checks(context, mode), *gpu_times.block_checks(context, mode)]


class Step(NamedTuple):
    """A part of the run, in processes of its own."""

    checks: Callable[[Context], list[Check]]
    seconds: float  # its share of the budget, whose default is 480
    stall: float = 60.0  # seconds after which a single check counts as hung
    workers: int = 1  # at a time; more than one only where nothing is timed
    warm: bool = False


STEPS = {
    "machine": Step(gpu_machine.checks, 180, stall=170),
    "correctness": Step(correctness, 130, workers=12),
    "proofs": Step(gpu_proofs.checks, 90, stall=80, workers=6),
    "compile": Step(timed, 60, workers=12, warm=True),
    "convolutions": Step(gpu_times.convolution_checks, 60),
    "network": Step(gpu_networks.inference_checks, 90, stall=90),
    "blocks": Step(gpu_times.block_checks, 90, stall=60),
    "training": Step(gpu_networks.training_checks, 90, stall=90),
    "autotuned": Step(autotuned, 240, stall=200),
    "sanitize": Step(gpu_sanitize.checks, 400, stall=200, workers=2),
}


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


def limit_of(step: Step, left: float, budget: float) -> float:
    """Seconds that a step may take: its share of the budget, at most what is left.

    >>> limit_of(STEPS["network"], 500, 480), limit_of(STEPS["network"], 50, 480), limit_of(STEPS["network"], 500, 48)
    (90.0, 50, 9.0)
    """
    return min(left, step.seconds * budget / 480)


def run_steps(names: Sequence[str], document: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Every step within its limit; results are kept after each."""
    end = time.monotonic() + options.budget
    commit = gpu_machine.commit()["commit"]
    for name in names:
        step = STEPS[name]
        context = Context(options.device, options.tiny, 0.4, not options.tiny, step.warm, document["rates"])
        begin = time.monotonic()
        try:
            checks = [check.name for check in step.checks(context)]
            limit = limit_of(step, end - begin, options.budget)
            workers = 1 if options.tiny else step.workers
            rows = gpu_pool.run(name, checks, context, limit, step.stall, workers)
        except Exception as error:  # a step that cannot even be listed must not lose the others
            rows = [{"case": name, "status": "failed", "error": f"{type(error).__name__}: {error}", "seconds": 0.0}]
        seconds = round(time.monotonic() - begin, 1)
        document["steps"][name] = {"seconds": seconds, "commit": commit, "cases": rows}
        if name == "machine":
            document["rates"] = gpu_machine.rates(rows)
        keep(document, path)
        print(f"== {name}: {seconds} s, {end - time.monotonic():.0f} s left", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="these steps; what is kept of the others stays")
    parser.add_argument(
        "--budget", type=float, default=480.0, help="seconds; what does not fit is skipped, and said so"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS", help="tune the launches first")
    parser.add_argument("--device", default="cuda", help="cpu: exercise the script itself, times mean nothing")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument("--worker", nargs=4, metavar=("STEP", "CONTEXT", "SHARE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def as_worker(step: str, context: str, share: str, file: str) -> int:
    """Run a worker's share of a step."""
    given = Context.of_text(context)
    if given.is_cuda:
        torch.cuda.set_device(given.place)
    checks = gpu_tuning.checks(given) if step == "tune" else STEPS[step].checks(given)
    first, count = (int(part) for part in share.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))  # references run on the CPU, in every worker
    return work(checks, given, Path(file), (first, count))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    options = parse(arguments)
    if options.worker:
        return as_worker(*options.worker)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check: a CUDA device is needed, torch finds none", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "no GPU"
    path = options.out / f"{slug(gpu)}.json"
    document = load(path, gpu) if options.only else new_document(gpu)
    names = options.only or list(STEPS)
    if options.tune:
        document["steps"]["tune"] = gpu_tuning.run(options.tune, Context(options.device, options.tiny), options.out)
        keep(document, path)
    run_steps(names, document, path, options)
    print(gpu_table.render(document))
    print(f"written: {path}", flush=True)
    ran = [document["steps"][name] for name in (*names, *(["tune"] if options.tune else []))]
    return int(any(row["status"] == "failed" for step in ran for row in step["cases"]))


if __name__ == "__main__":
    sys.exit(ended(main))
