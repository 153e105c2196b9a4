"""The tuner as a step of `benchmarks.gpu_check`: in a process of its own, before anything is timed."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import gpu_pool
from .gpu_worker import Check, Context, Unavailable

Row = dict[str, Any]


def checks(context: Context) -> list[Check]:
    """One check that takes `context.seconds`; what a rehearsal finds stays out of this installation."""
    folder = Path(tempfile.mkdtemp()) if context.rehearse else None
    return [Check("tune", functools.partial(tune, folder=folder))]


def tune(context: Context, folder: Path | None = None) -> Row:
    """Tune the widths of WRN-32-4 and ResNet-42; the table goes into this installation, or into a folder."""
    try:
        from den_kernels import tune as tuner
        from den_kernels._triton.launch import architecture
        from den_kernels._triton.table import file_of
        from den_kernels._triton.trial import Problem, problems
    except ImportError as error:
        raise Unavailable(str(error)) from None
    if not context.is_cuda and folder is None:
        raise Unavailable("launches are tuned on a GPU")
    dtypes = (torch.bfloat16, torch.float32)
    todo = problems(("convolve", "weight"), (256, 128, 64, 512), dtypes)
    if context.tiny:
        todo = [Problem("convolve", 16, 4, 2, torch.bfloat16)]
    found = tuner.tune(todo, context.place, context.seconds, folder, lambda line: print(line, flush=True))
    table = file_of(architecture(context.place)[0], folder)
    lines = [tuner.describe(one) for one in found]
    return {"lines": lines, "searched": len(found), "problems": len(todo), "table": str(table)}


def run(seconds: float, context: Context, out: Path) -> Row:
    """The step's results; a copy of the table in `out`/tables."""
    begin = time.monotonic()
    context = dataclasses.replace(context, seconds=seconds)
    try:
        rows = gpu_pool.run("tune", ["tune"], context, seconds + 60, seconds + 60)
    except Exception as error:
        rows = [gpu_pool.failure("tune", f"{type(error).__name__}: {error}")]
    for row in rows:
        print("\n".join(row.get("lines", ())), flush=True)
        if "table" in row and Path(row["table"]).exists():
            (out / "tables").mkdir(parents=True, exist_ok=True)
            shutil.copy(row["table"], out / "tables")
    return {"seconds": round(time.monotonic() - begin, 1), "cases": rows}
