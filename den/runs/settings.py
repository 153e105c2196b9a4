"""Settings of den evaluate."""

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
    """Compare with the best of this many single structures of the same cost, chosen on held-out images, of a run that
    held none out on the test images themselves."""
    dense: Path | None = None
    """Run folder of a dense network of the same tasks: tell whether images cost more that it finds harder."""
    selector: Literal["own", "random"] = "own"
    """random: draw every block's level by chance in place of the run's selector (the paper's "DEN + rand sel"); written
    to evaluation.random.json, which reports show as a row of its own."""
    random_flops: Annotated[float | None, Range(0, 1)] = None
    """With --selector random: share of the full structure's FLOPs that its structures cost; None: uniform ones."""
    levels: Annotated[tuple[int, ...], Range(0)] = ()
    """Run all images of every task at this level of every block, for each level given: the lower levels of one training
    of NestedNet.  Written to evaluation.level-L.json."""
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
        budget = self.budget_flops is not None or self.budget_ms is not None
        if sum((budget, self.selector == "random", bool(self.levels))) > 1:
            raise ValueError("evaluate: a budget, --selector random and --levels must come one at a time, got several")
        if self.random_flops is not None and self.selector != "random":
            raise ValueError("evaluate: random_flops must come with --selector random, got it alone")
        check_ranges(self, "evaluate")
