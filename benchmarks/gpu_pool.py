"""Runs the checks of a step in worker processes and outlives all that can happen to them: faults, hangs, time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_worker import Context, append, read, share_of

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, "-m", "benchmarks.gpu_check")
OUT_OF_TIME = "out of time"
PERIOD = 0.1  # seconds between two looks at the workers
Row = dict[str, Any]


class Worker:
    """One process with its share of the checks, started again after a fault or a hang, until its checks are through."""

    def __init__(self, command: Sequence[str], names: Sequence[str], file: Path, stall: float) -> None:
        self.command, self.names, self.file, self.stall = list(command), list(names), file, stall
        self.reported = 0
        self._start()

    def _start(self) -> None:
        self.log = self.file.with_suffix(".log").open("ab")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.heard = time.monotonic()
        self.lines = self.lines_at_start = sum(map(len, read(self.file)))

    def stop(self) -> None:
        """End the process and what it started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def look(self) -> bool:
        """Whether checks are left. A process that died or says nothing for too long is replaced.

        What was running gets the blame. A process that began nothing would do so again: all checks left fail with it.
        """
        lines = sum(map(len, read(self.file)))
        if lines != self.lines:
            self.heard, self.lines = time.monotonic(), lines
        hung = time.monotonic() - self.heard > self.stall
        if not hung and self.process.poll() is None:
            return True
        self.stop()
        begun, rows = read(self.file)
        why = f"no result for {self.stall:.0f} s" if hung else self.last_words()
        idle = len(begun) + len(rows) == self.lines_at_start
        left = [name for name in self.names if name not in begun]
        known = {row["case"] for row in rows}
        for name in [name for name in begun if name not in known] + (left if idle else []):
            append(self.file, failure(name, why))
        if left and not idle:
            self._start()
            return True
        return False

    def last_words(self) -> str:
        """How a process ended."""
        text = self.file.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
        return f"worker ended with status {self.process.returncode}: {' | '.join(text[-3:])[-400:]}"


def failure(name: str, why: str) -> Row:
    """The result of a check that left none."""
    return {"case": name, "status": "failed", "error": why, "seconds": 0.0}


def run(
    step: str,
    names: Sequence[str],
    context: Context,
    limit: float,
    stall: float,
    workers: int = 1,
    program: Sequence[str] = PROGRAM,
) -> list[Row]:
    """The results of all checks of a step, in order; those that did not fit the limit (seconds) are skipped."""
    end = time.monotonic() + limit
    if limit < 1:
        return [{"case": name, "status": "skipped", "reason": OUT_OF_TIME, "seconds": 0.0} for name in names]
    count = max(1, min(workers, len(names), os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        started: list[Worker] = []
        try:
            for i in range(count):
                file, share = Path(folder) / f"{i}.jsonl", f"{i}/{count}"
                command = [*program, "--worker", step, context.text(), share, str(file)]
                started.append(Worker(command, share_of(names, (i, count)), file, stall))
            running = list(started)
            while running and time.monotonic() < end:
                time.sleep(PERIOD)
                running = [worker for worker in running if worker.look()]
                announce(started)
        finally:
            for worker in started:
                worker.stop()
            announce(started)
        return collect(names, [read(worker.file) for worker in started])


def announce(workers: Sequence[Worker]) -> None:
    """A line for every result that is new."""
    for worker in workers:
        rows = read(worker.file)[1]
        for row in rows[worker.reported :]:
            print(progress(row), flush=True)
        worker.reported = len(rows)


def progress(row: Row) -> str:
    """One line."""
    note = str(row.get("error") or row.get("reason") or row.get("computed") or "")
    return f"{row['status']:<7} {row['seconds']:7.2f} s  {row['case']}  {note[:160]}".rstrip()


def collect(names: Sequence[str], files: Sequence[tuple[list[str], list[Row]]]) -> list[Row]:
    """One row a check: its result, or that it was cut short or not begun."""
    rows = {row["case"]: row for _, found in files for row in found}
    begun = {name for found, _ in files for name in found}
    for name in names:
        if name not in rows:
            reason = f"{OUT_OF_TIME} while it ran" if name in begun else OUT_OF_TIME
            rows[name] = {"case": name, "status": "skipped", "reason": reason, "seconds": 0.0}
    return [rows[name] for name in names]
