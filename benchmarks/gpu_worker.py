"""The checks of one step, in a process of their own: a fault of the device ends the process, not the run.

Every check leaves two lines of JSON in the worker's file, one when it begins and one with its result, so that the
process that started the worker knows what a worker that died or hung was doing.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

BATCH = 77  # odd, and more than half of the multiprocessors of any GPU here: fewer instances get no fused kernel
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")
DEAD = 3  # exit status: the device answers nothing in this process any more


class Unavailable(Exception):
    """What a check needs is not here; it is reported as skipped, with the reason."""


@dataclass(frozen=True)
class Context:
    """Where and how large: every check and every timing takes it."""

    device: str = "cuda"
    tiny: bool = False  # sizes for a CPU, or for an interpreter of the kernels: values count, times do not
    seconds: float = 0.4  # for the rounds of one timing
    compiles: bool = True  # the dense side through torch.compile as well
    rehearse: bool = False  # on a simulated GPU (rehearsal.py), so that every line has run before it meets a card
    warm: bool = False  # run every timed function once, so that its kernels are compiled, and take no time
    rates: Mapping[str, float] = field(default_factory=dict)  # measured: FLOP/s by dtype, bytes/s as "copy"

    @property
    def place(self) -> torch.device:
        """The device as torch knows it."""
        return torch.device(self.device)

    @property
    def is_cuda(self) -> bool:
        """Whether there are streams, events and graphs."""
        return self.place.type == "cuda"

    def size(self, full: int, tiny: int) -> int:
        """A size within the budget."""
        return tiny if self.tiny else full

    def text(self) -> str:
        """As JSON, for a worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Context:
        """The inverse of `text`."""
        return cls(**json.loads(text))


class Check(NamedTuple):
    """A named check or timing; what `run` returns goes into the results."""

    name: str
    run: Callable[[Context], dict[str, Any]]


def synchronize(context: Context) -> None:
    """Wait for the device, where there is one to wait for."""
    if context.is_cuda:
        torch.cuda.synchronize()


def find_program(name: str, context: Context) -> str:
    """The path of a tool of the CUDA toolkit. Raises Unavailable where it, or a GPU, is missing."""
    if not context.is_cuda:
        raise Unavailable("a CUDA device is needed")
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if found is None:
        raise Unavailable(f"{name} is not installed")
    return found


def outcome(check: Check, context: Context) -> dict[str, Any]:
    """Run one check: its status and what it measured, or why not."""
    begin = time.perf_counter()
    row: dict[str, Any] = {"case": check.name}
    try:
        measured = check.run(context)
        synchronize(context)
        row |= {"status": "ok", **measured}
    except Unavailable as reason:
        row |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        text = " ".join(str(error).split())
        row |= {"status": "failed", "error": f"{type(error).__name__}: {text[:600]}", "where": where}
    return row | {"seconds": round(time.perf_counter() - begin, 3)}


def is_dead(context: Context) -> bool:
    """Whether the device refuses everything after a fault."""
    try:
        synchronize(context)
    except RuntimeError:
        return True
    return False


def read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of the checks that a worker began, and the results that it left."""
    begun, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off in the middle
            continue
        if "begin" in entry:
            begun.append(entry["begin"])
        else:
            rows.append(entry)
    return begun, rows


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """One line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def share_of(names: Sequence[str], share: tuple[int, int]) -> list[str]:
    """Every n-th name.

    >>> share_of(["a", "b", "c"], (1, 2))
    ['b']
    """
    return list(names[share[0] :: share[1]])


def work(checks: Iterable[Check], context: Context, path: Path, share: tuple[int, int] = (0, 1)) -> int:
    """Run this worker's share of the checks, those that it has begun before left out; the exit status."""
    checks = list(checks)
    mine = set(share_of([check.name for check in checks], share)) - set(read(path)[0])
    for check in checks:
        if check.name not in mine:
            continue
        append(path, {"begin": check.name})
        row = outcome(check, context)
        append(path, row)
        if row["status"] == "failed" and is_dead(context):
            return DEAD
    return 0
