"""Files read ahead by worker processes, in an order that does not depend on their number."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from den.support import ranks

J = TypeVar("J")  # a job: what is to be read
R = TypeVar("R")  # tensors that were read, in tuples and dictionaries
MOST = 8


class ReadAhead(Generic[J, R]):
    """Results of jobs, done by worker processes before they are asked for; the processes start with the first one.

    Args:
        read: does a job; a ValueError or OSError of it is raised where its result is asked for.
        draw: the next job, and what the caller keeps of the moment after drawing it.
        workers: number of processes, at least 1.  Each has up to two jobs at hand.
        pinned: results lie in pinned memory, from which a GPU copies while the host goes on.
    """

    def __init__(self, read: Callable[[J], R], draw: Callable[[], tuple[J, Any]], workers: int, pinned: bool) -> None:
        self._drawn: deque[tuple[J, Any]] = deque()
        self._draw = draw
        self._loader: DataLoader[R] = DataLoader(
            _Reading(read), batch_size=None, sampler=_Drawing(self._jobs), num_workers=workers, collate_fn=_same,
            pin_memory=pinned, worker_init_fn=_begin, generator=torch.Generator(),
        )  # fmt: skip
        self._results: Iterator[Any] | None = None

    def next(self) -> tuple[J, Any, R]:
        """The next job, what `draw` gave with it, and its result."""
        if self._results is None:
            self._results = iter(self._loader)
        try:
            result = next(self._results)
        except RuntimeError as error:  # a worker was killed, or found no room in the shared memory
            reason = str(error).splitlines()[0]
            raise ValueError(f"data: processes that read ahead must stay alive, got {reason}") from error
        job, moment = self._drawn.popleft()
        if isinstance(result, Exception):
            raise result
        return job, moment, result

    def close(self) -> None:
        """End the processes; jobs that were drawn and not asked for are forgotten."""
        self._results = None
        self._drawn.clear()

    def _jobs(self) -> Iterator[J]:
        while True:
            self._drawn.append(self._draw())
            yield self._drawn[-1][0]


def chosen_workers(asked: int | None) -> int:
    """The processes that read for this one: as many as asked for; None: half of its share of the CPUs, 1 to 8."""
    if asked is not None:
        return asked
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cpus // (2 * ranks.processes_here())))


class _Reading(Dataset[Any]):
    """Results by job; errors are results, too, so that they arrive as they are."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read

    def __getitem__(self, job: Any) -> Any:
        try:
            return self._read(job)
        except (ValueError, OSError) as error:
            return error


class _Drawing(Sampler[Any]):
    """Endless jobs."""

    def __init__(self, jobs: Callable[[], Iterator[Any]]) -> None:
        self._jobs = jobs

    def __iter__(self) -> Iterator[Any]:
        return self._jobs()


def _same(result: Any) -> Any:
    return result


def _begin(_: int) -> None:
    """Let a worker be ended by signals as other processes are, whatever its parent does with them."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
