"""Settings of den evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from den.support.limits import Range, check_ranges


@dataclass(frozen=True)
class Evaluate:
    """Measure trained runs on their test sets; the numbers are also written to evaluation.json of the run folder."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run folders.  With a budget: the best of them on held-out images is measured."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints: the last one, or the best on held-out images."""
    data_root: Path | None = None
    """Folder of the sets that do not come with the install; None: where the run had them."""
    static: Annotated[int, Range(0, 20_000)] = 0
    """Compare with the best of this many single structures of the same cost, chosen on the test images themselves."""
    time: bool = False
    """Measure the time per image, with the full structure and with the selected ones."""
    budget_flops: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Shift the selector, without training, until every task costs this share of the full structure's FLOPs."""
    budget_ms: Annotated[float | None, Range(0, open_low=True)] = None
    """Shift the selector, without training, until an image of every task takes this long here, in batches of 256."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""
    out: Path | None = None
    """Folder for evaluation.json, with several runs for a folder of each; None: the run folders."""

    def check(self) -> None:
        """Raise ValueError where runs are missing, both budgets are given, or a value is out of its range."""
        if not self.runs:
            raise ValueError("evaluate: runs must be at least one run folder, got none")
        if self.budget_flops is not None and self.budget_ms is not None:
            raise ValueError("evaluate: budget must be in FLOPs or in milliseconds, got both")
        check_ranges(self, "evaluate")
