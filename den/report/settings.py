"""Settings of den report and den predict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from den.support.limits import Range, check_ranges


@dataclass(frozen=True)
class Report:
    """Put runs together: the paper's tables with ours beside its numbers, figures, and what does not hold."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run folders; one without a current evaluation.json is measured first."""
    out: Path = Path("report")
    """Folder for report.md, and the tables (.md, .csv, .tex) and figures (.png) of each scenario and backbone."""
    data_root: Path | None = None
    """Folder of the sets that do not come with the install; None: where the runs had them."""
    time: bool = False
    """Measure the time per image of the runs that were not timed."""
    figures: bool = True
    """Draw the figures."""


@dataclass(frozen=True)
class Predict:
    """Classify pictures with a trained network: their classes, structures and costs as a table, JSON or drawings."""

    run: tyro.conf.Positional[Path]
    """Folder of a run (den train), or of an engine (Engine.save_pretrained with kept=...)."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, and folders of pictures.  Those that cannot be read are named and left out."""
    task: str | None = None
    """One of the network's tasks (of folder:PATH@64 the last name of the path will do); None: all of them."""
    json: Path | None = None
    """File for the predictions as JSON lines; -: print them in place of the table."""
    pictures: Path | None = None
    """Folder for a drawing of each picture with its classes, its structure and its cost."""
    top: Annotated[int, Range(1)] = 5
    """Classes of each picture that are written to JSON and drawn."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints: the last one, or the best on held-out images."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""
    out: Path | None = None
    """Folder for the predictions of many pictures, in parts: the same command, given again, goes on where it ended."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """With --out: JSON lines, or Parquet (extra: serve)."""
    ray: bool = False
    """With --out: predict on Ray Data (extra: serve), on all cores or GPUs; every machine must see the folders."""
    ray_address: str | None = None
    """With --ray: the cluster, such as auto or ray://HOST:10001; None: Ray is started on this machine alone."""
    workers: Annotated[int, Range(0)] = 0
    """With --ray: processes that predict; 0: one for each core, or each GPU."""

    def check(self) -> None:
        """Raise ValueError where there are no images, options do not fit together, or a value is out of its range."""
        if not self.images:
            raise ValueError("predict: images must be at least one picture or folder, got none")
        if self.out is not None and (self.json is not None or self.pictures is not None):
            raise ValueError("predict: out must come without json and pictures, got both")
        if self.out is None and (self.ray or self.format != "jsonl"):
            raise ValueError("predict: ray and format must come with --out FOLDER, got them alone")
        if not self.ray and (self.ray_address is not None or self.workers):
            raise ValueError("predict: ray_address and workers must come with --ray, got them alone")
        check_ranges(self, "predict")
