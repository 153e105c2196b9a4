"""Results that `benchmarks.gpu_check` keeps of a GPU, and the report of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import results, tables
from .gpu_rows import Row
from .targets import GPU_TARGETS

KEPT = ("check", "status", "seconds")  # of a timed case among the checks: the rest is in its row


class GpuResults:
    """A results file: "rows" as in every other (results.py), and under "gpu" what only a GPU tells.

    That is "name", "machine" (names, versions, commit), "rates" (measured FLOP/s by dtype, bytes/s as "copy"), "steps"
    ({step: {"seconds", "commit"}}), "checks" (a row each, with its "step") and "targets" (measured, met).
    """

    def __init__(self, path: Path, gpu: str, *, afresh: bool = False) -> None:
        self.path = path
        self.gpu: dict[str, Any] = {"name": gpu, "machine": {}, "rates": {}, "steps": {}, "checks": [], "targets": []}
        self.rows: list[Row] = []
        if not afresh and (document := _load(path)).get("gpu", {}).get("name") == gpu:
            self.rows, self.gpu = document["rows"], self.gpu | document["gpu"]

    def put(self, step: str, seconds: float, checks: Sequence[Row], source: Row) -> None:
        """Replace the earlier checks of a step by these, and the rows of cases by the timed ones, with their source."""
        own = [{"step": step} | ({k: row[k] for k in KEPT} if "providers" in row else row) for row in checks]
        self.gpu["checks"] = [row for row in self.gpu["checks"] if row["step"] != step] + own
        self.gpu["steps"][step] = {"seconds": round(seconds, 1), "commit": source["commit"]}
        timed = [row | source for row in checks if "providers" in row and row["status"] == "ok"]
        self.rows = results.merge(self.rows, timed)

    def keep(self) -> None:
        """Work out the targets and write the file, whole or not at all."""
        rows = {row["case"]: row for row in self.rows}
        self.gpu["targets"] = [
            vars(target) | {"measured": value, "met": None if value is None else target.is_met(value)}
            for target in GPU_TARGETS
            for value in [target.value(rows)]
        ]
        results.store(self.path, self.rows, gpu=self.gpu)

    def with_status(self, status: str) -> list[Row]:
        """Checks that ended with this status."""
        return [row for row in self.gpu["checks"] if row["status"] == status]

    def report(self) -> str:
        """All times and targets, what was skipped and what failed; the most important lines last."""
        failed, skipped = self.with_status("failed"), self.with_status("skipped")
        met = [target["met"] for target in self.gpu["targets"]]
        machine = self.gpu["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
        rates = ", ".join(f"{name} {value / 1e12:.2f} T" for name, value in self.gpu["rates"].items())
        return "\n".join(
            [
                tables.providers_table(self.rows) if self.rows else "nothing was timed",
                "",
                tables.targets_table(self.rows, targets=GPU_TARGETS),
                "",
                *shortened([f"skipped {row['check']}: {row['reason']}" for row in skipped], 12),
                *shortened([f"FAILED {row['check']}: {row['error']}"[:400] for row in failed], 20),
                f"{self.gpu['name']}, {versions}, commit {machine.get('commit')}; measured: {rates or '-'}",
                f"{len(self.with_status('ok'))} checks passed, {len(failed)} failed, {len(skipped)} skipped; "
                f"targets: {met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured",
            ]
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def shortened(lines: list[str], most: int) -> list[str]:
    """The first lines, and how many more there are.

    >>> shortened(["a", "b", "c"], 1)
    ['a', '... and 2 more']
    """
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]
