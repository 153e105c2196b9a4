"""The parts of a job on Ray Data: processes over a cluster that write them to a folder that all of them see."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from den.runs.bulk import Done, Job, write_part
from den.runs.predict import load


class PartWriter:
    """One process: the network, opened once."""

    def __init__(self, job: Job, home: Path) -> None:
        torch.set_num_threads(1)
        os.chdir(home)  # paths of the job may be relative
        self._job, self._network = job, load(job.run, checkpoint=job.checkpoint, device=job.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the part that a row names."""
        done = write_part(self._network, self._job, int(row["number"]))
        broken = [[str(file), why] for file, why in done.broken]
        return {"number": done.number, "pictures": done.pictures, "broken": broken}


def on_ray(job: Job, numbers: Sequence[int], address: str | None = None, workers: int = 0) -> Iterator[Done]:
    """Write parts by as many processes as `workers` (0: one for each core, or each GPU), in any order."""
    ray.init(address or "local", logging_level="ERROR", **({} if address else {"include_dashboard": False}))
    try:
        gpu = job.device.startswith("cuda") or (job.device == "auto" and torch.cuda.is_available())
        found = ray.cluster_resources().get("GPU" if gpu else "CPU", os.cpu_count() or 1)
        count = min(workers or max(1, int(found)), len(numbers))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours is shown
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        each = {"num_cpus": 0 if gpu else 1, "num_gpus": int(gpu), "compute": ray.data.ActorPoolStrategy(size=count)}
        done = rows.map(PartWriter, fn_constructor_args=(job, Path.cwd()), **each)
        for row in done.iter_rows():
            broken = tuple((Path(file), why) for file, why in row["broken"])
            yield Done(int(row["number"]), int(row["pictures"]), broken)
    finally:
        ray.shutdown()
