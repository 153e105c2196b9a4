"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check``.

Builds the extension and runs one problem of every kernel within a minute; where that fails nothing else runs. Then it
measures the machine's ceilings and runs `pytest tests/gpu` (every op against float64, nothing that waits for the
device, graphs, compilation, export), the `/cuda` cases of `pytest benchmarks` against the best dense baseline and the
floors, and ncu; what time is left goes to dense sides whose kernels are searched for and to compute-sanitizer. Results
go to benchmarks/results/<gpu>.json after every step (gpu_results.py says what it holds), a report to stdout, its last
lines the most important ones. Exit status: 0, 1 where a check failed, 2 without a GPU. `--rehearse` runs all of it
without one, tiny, on a simulated GPU (rehearsal.py), and keeps nothing.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, the packages may not be
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"] + [str(ROOT)]
    __package__ = "benchmarks"

import torch  # noqa: E402

from benchmarks import gpu_machine, rehearsal  # noqa: E402
from benchmarks.gpu_results import GpuResults  # noqa: E402
from benchmarks.gpu_rows import OUT_OF_TIME, Row, append_to, read  # noqa: E402
from den.support.terminal import ended  # noqa: E402

NOTHING_CHOSEN = 5  # exit status of pytest
CHECK = 180  # seconds after which a single check counts as hung: compiling 60 kernels takes more than a minute
DEVICE = "cuda:0"
RESULTS = ROOT / "benchmarks" / "results"
TUNE = ("--channels", "256", "128", "64", "512")
WANTED = "ours-inplace ours-kernel ours-fused ours-composed dense-eager dense-folded dense-compiled"  # beside ours
COMPARED = tuple(f"--provider={name}" for name in WANTED.split())
TIMED, UNTIMED = (
    ("--benchmark-only", "--dense-compile=all", *COMPARED),
    ("--benchmark-disable", "--dense-compile=none", *COMPARED),
)


class Step(NamedTuple):
    """A part of the run: a call of pytest."""

    folder: str
    marks: str
    seconds: float = float("inf")  # that it may take at most
    workers: int = 0  # of pytest-xdist, which also replaces those that die; none where something is timed
    options: tuple[str, ...] = ()
    rehearsed: str = ""  # of its checks only these in a rehearsal, as pytest's -k


STEPS = {
    "smoke": Step("tests/gpu", "smoke", 60, workers=4),
    "checks": Step("tests/gpu", "not smoke and not tool and not profiler", workers=12),
    "compile": Step("benchmarks", "check", workers=12, options=UNTIMED, rehearsed="plan"),
    "times": Step("benchmarks", "check", options=TIMED),
    "profile": Step("tests/gpu", "profiler", 60),
    "autotuned": Step(
        *("benchmarks", "check and (network or residual)", 240),
        options=("--autotune", *TIMED),
        rehearsed="residual and full",
    ),
    "sanitize": Step("tests/gpu", "tool", 400, workers=2),
}


def slug(gpu: str) -> str:
    """The name of the results file.

    >>> slug("NVIDIA H200"), slug("NVIDIA GeForce RTX 4090 (x2)")
    ('nvidia-h200', 'nvidia-geforce-rtx-4090-x2')
    """
    return "-".join(re.findall(r"[a-z0-9]+", gpu.lower()))


def pytest_command(step: Step, rows: Path, until: float, options: argparse.Namespace) -> list[str]:
    """Command line of a step."""
    hung = ("-o", f"faulthandler_timeout={CHECK}", "-o", "faulthandler_exit_on_timeout=true")
    most = int(step is STEPS["smoke"]) if options.rehearse else os.cpu_count() or 1  # one core: spread only once
    workers = min(step.workers, most)
    spread = ("-n", str(workers)) if workers else ("-p", "no:xdist")
    select = options.select if step is not STEPS["smoke"] else None  # which runs whole, whatever is asked for
    expressions = [f"({text})" for text in (select, options.rehearse and step.rehearsed) if text]
    chosen = ("-k", " and ".join(expressions)) if expressions else ()
    plugins = ("-p", "benchmarks.gpu_rows", *(("-p", "benchmarks.rehearsal", "--rehearse") if options.rehearse else ()))
    kept = ("--rows", str(rows), "--until", str(until), "-p", "no:cacheprovider", "-v", "--no-header", "--tb=short")
    timed = (f"--case-seconds={0 if options.rehearse else 0.1}",) if step.folder == "benchmarks" else ()
    return [
        # The root is given: a worker that replaces a dead one would find another, and checks would have other names.
        *(sys.executable, "-m", "pytest", step.folder, f"--rootdir={ROOT}", "-m", step.marks),
        *(*plugins, *kept, *hung, *spread, *chosen, *timed, *step.options),
    ]


def environment() -> dict[str, str]:
    """Environment of child processes, with this process's import path."""
    path = os.pathsep.join([*filter(None, sys.path), str(ROOT)])  # at the end: an installed den stays the one checked
    return os.environ | {"PYTHONPATH": path}


def stream(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a program, its lines printed as they come, killed with all it started after so long; status, last lines."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer, last = threading.Timer(seconds, kill), deque[str](maxlen=6)
    timer.start()
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last.append(line.strip(" =!\n"))
    finally:
        timer.cancel()
        status = process.wait() if process.stdout else 1
        kill()
    return status, " | ".join(filter(None, last))[-400:]


def run_step(name: str, seconds: float, options: argparse.Namespace) -> list[Row]:
    """Run a step and return a row for each check, those included that died, hung or did not fit.

    A process that a check ended is started again for the rest; one in which none began fails as a whole.
    """
    step, end = STEPS[name], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        file, begun = Path(folder) / "rows.jsonl", 0
        while (left := end - time.monotonic()) > 1:
            status, last = stream(pytest_command(step, file, time.time() + left, options), left)
            entries, over = read(file), time.monotonic() >= end
            why = f"{OUT_OF_TIME} while it ran" if over else f"the process ended with status {status}: {last}"
            for check in unfinished(entries):
                append_to(file, row(check, why, "skipped" if over else "failed"))
            if over or any("finished" in entry for entry in entries):
                break
            before, begun = begun, sum("begin" in entry for entry in entries)
            if step.workers or begun == before:  # workers are replaced by pytest-xdist, which has ended itself
                nothing = status == NOTHING_CHOSEN
                append_to(
                    file, row(name, "nothing of it was chosen" if nothing else why, "skipped" if nothing else "failed")
                )
                break
        return collect(name, read(file))


def row(check: str, why: str, status: str) -> Row:
    """Row of a check that left none of its own."""
    return {"check": check, "status": status, "reason" if status == "skipped" else "error": why, "seconds": 0.0}


def unfinished(entries: Sequence[Row]) -> list[str]:
    """The checks that began and did not end."""
    ended_ones = {entry.get("check") for entry in entries}
    return [entry["begin"] for entry in entries if "begin" in entry and entry["begin"] not in ended_ones]


def collect(step: str, entries: Sequence[Row]) -> list[Row]:
    """One row for each check, in the order of collection.

    A check without a result did not fit the time and is skipped; in the step "smoke" that is a failure.
    """
    names = dict.fromkeys(name for entry in entries for name in entry.get("collected", ()))
    rows = {name: row(name, OUT_OF_TIME, "skipped") for name in names or [step]}
    rows |= {entry["check"]: entry for entry in entries if "check" in entry}
    late = [each for each in rows.values() if each.get("reason", "").startswith(OUT_OF_TIME) and step == "smoke"]
    return list((rows | {each["check"]: row(each["check"], each["reason"], "failed") for each in late}).values())


def machine(options: argparse.Namespace) -> Row:
    """Description of the machine, asked of a process that starts now; {} where that fails."""
    command = [sys.executable, *rehearsed(options, "benchmarks.gpu_machine"), DEVICE]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=CHECK, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"== machine: {error} {str(error.stderr)[-300:]}", flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def tune(options: argparse.Namespace) -> Row:
    """Tune the launches of Triton; the tables stay in this installation, with a copy in the folder of the results."""
    begin, folder = time.monotonic(), ROOT / "den_kernels" / "_triton" / "tables"
    command = [sys.executable, *rehearsed(options, "den_kernels.tune"), "--seconds", str(options.tune)]
    if options.rehearse:
        folder = options.out / "tuned"
        command += ["--out", str(folder)]
    more = 600 if options.rehearse else 60  # seconds for a last problem; a rehearsal's machine may be a busy one
    status, last = stream([*command, *(() if options.rehearse else TUNE)], options.tune + more)
    for table in folder.glob("sm_*.json"):
        (options.out / "tables").mkdir(parents=True, exist_ok=True)
        shutil.copy(table, options.out / "tables")
    done = {"check": "tune", "status": "ok", "seconds": round(time.monotonic() - begin, 1)}
    return row("tune", f"it ended with status {status}: {last}", "failed") if status else done


def rehearsed(options: argparse.Namespace, module: str) -> tuple[str, ...]:
    """Arguments of Python that run a module, under the rehearsal where that is asked for."""
    return ("-m", "benchmarks.rehearsal", module) if options.rehearse else ("-m", module)


def run_steps(names: Sequence[str], found: GpuResults, options: argparse.Namespace) -> bool:
    """Run the steps within the budget, keeping results after each; True where all passed.

    A failed step "smoke" ends the run.
    """
    end = time.monotonic() + options.budget
    for name in names:
        begin = time.monotonic()
        if name == "build":
            checks = [gpu_machine.build()] if not options.rehearse else []
        elif name == "machine":
            found.gpu["machine"] = machine(options)
            found.gpu["rates"] = found.gpu["machine"].pop("rates", {})
            checks = [] if found.gpu["machine"] else [row("machine", "it does not say what it is", "failed")]
        elif name == "tune":
            checks, end = [tune(options)], end + options.tune
        else:
            most = float("inf") if options.rehearse else STEPS[name].seconds
            checks = run_step(name, min(end - begin, most), options)
        source = gpu_machine.commit() | {"measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": found.path.stem}
        found.put(name, time.monotonic() - begin, checks, source)
        found.keep()
        print(f"== {name}: {time.monotonic() - begin:.1f} s, {end - time.monotonic():.0f} s left", flush=True)
        if name == "smoke" and any(check["status"] == "failed" for check in checks):
            print("== the smoke failed: nothing else runs", flush=True)
            return False
    return not found.with_status("failed")


def order(options: argparse.Namespace) -> list[str]:
    """Steps in order: building and the smoke first, whatever else is asked for; tuning before anything is timed."""
    chosen = [name for name in list(STEPS)[1:] if name in (options.only or STEPS)]
    return ["build", "smoke", "machine", *(["tune"] if options.tune else []), *chosen]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="these steps; what is kept of the others stays")
    parser.add_argument("--select", metavar="EXPRESSION", help="of every step but the smoke only these, as pytest's -k")
    parser.add_argument(
        "--budget", type=float, default=480.0, help="seconds; what does not fit is skipped, and said so"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS", help="tune the launches after the smoke")
    parser.add_argument("--rehearse", action="store_true", help="all of it on a simulated GPU; no results are kept")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def rehearsing(options: argparse.Namespace) -> Iterator[None]:
    """Context in which everything runs on a simulated GPU; results go to `--out`, or nowhere."""
    options.tune = options.tune or 5.0
    with tempfile.TemporaryDirectory() as folder:
        options.out = options.out or Path(folder)  # which is removed
        with mock.patch.dict(os.environ, rehearsal.environment(Path(folder))):
            yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(arguments)
    if options.rehearse and options.out and options.out.resolve().is_relative_to(RESULTS):
        message = f"--out must be outside {RESULTS} where --rehearse is given, got {options.out}"
    elif not options.rehearse and not torch.cuda.is_available():
        message = "a CUDA device is needed, torch finds none"
    else:
        with rehearsing(options) if options.rehearse else contextlib.nullcontext():
            return run(options, "rehearsal" if options.rehearse else torch.cuda.get_device_name(DEVICE))
    print(f"gpu_check: {message}", file=sys.stderr)
    return 2


def run(options: argparse.Namespace, gpu: str) -> int:
    """Run the steps that are asked for, print the report and return the exit status."""
    options.out = options.out or RESULTS
    found = GpuResults(options.out / f"{slug(gpu)}.json", gpu, afresh=not options.only)
    passed = run_steps(order(options), found, options)
    print(found.report())
    print(f"written: {found.path}", flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(ended(main))
