"""A run's folder: config.json, versions.json, metrics.jsonl, events/ (TensorBoard), {last,best}.safetensors."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from den.config import TrainConfig, read_config, to_dict

NOT_COMPARED = ("out", "progress")  # settings that may differ between a run and its continuation
PACKAGES = ("den-kernels", "torch", "numpy", "safetensors", "scikit-learn")


class RunFolder:
    """Creates the folder of a new run, or opens that of a run to be continued.

    Raises ValueError when the folder cannot be written, already holds a run (new run), holds none or one with other
    settings (continued run).
    """

    def __init__(self, config: TrainConfig, *, resume: bool) -> None:
        self.path = Path(config.out)
        self.last, self.best = self.path / "last.safetensors", self.path / "best.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        if resume:
            self._check_same(config)
        elif self.last.exists():
            raise ValueError(f"train: out must be a folder without a run, got {self.path} (continue it with --resume)")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                _write_json(self.path / "config.json", to_dict(config))
                self.metrics.write_text("", encoding="utf-8")
            _write_json(self.path / "versions.json", versions())
        except OSError as error:
            raise ValueError(f"train: out must be a folder that can be written, got {self.path}: {error}") from error
        self._events = None

    def _check_same(self, config: TrainConfig) -> None:
        if not self.last.exists():
            raise ValueError(f"train: out must hold {self.last.name} to be continued, got {self.path}")
        stored = _flat(to_dict(read_config(type(config), self.path / "config.json")))
        given = _flat(to_dict(config))
        for key in stored:
            if key not in NOT_COMPARED and stored[key] != given[key]:
                raise ValueError(f"train: {key} must stay {stored[key]} to continue {self.path}, got {given[key]}")

    def rewind(self, epoch: int) -> None:
        """Drop the metrics of epochs after `epoch`, which the checkpoint does not know."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.exists() else []
        self.metrics.write_text("".join(line for line in lines if json.loads(line)["epoch"] <= epoch), "utf-8")

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard at step line["step"]."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path / "events"), purge_step=line["step"])
        for name, value in _flat(line).items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._events.add_scalar(name.replace(".", "/"), value, line["step"])

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def stored_config(path: Path) -> TrainConfig:
    """The settings of the run in folder `path`; ValueError when there is none."""
    return read_config(TrainConfig, Path(path) / "config.json")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def versions() -> dict[str, str]:
    """Versions of everything that numbers may depend on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
