"""Settings of den report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


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
