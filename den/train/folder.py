"""A run's folder: config.json, versions.json, metrics.jsonl, events/ (TensorBoard), {last,best}.safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from den.support import launched, ranks
from den.support.files import PARTIAL, write_whole
from den.support.run_config import RunConfig
from den.support.settings import flattened, read_config, to_dict
from den.train.checkpoint import load_checkpoint, read_updates
from den.train.config import TrainConfig
from den.train.lock import RunLock

MAY_DIFFER = ("out", "progress", "device", "data.root", "data.workers", "start")  # in a continued run
CHECKPOINTS = ("last.safetensors", "best.safetensors", "searched.safetensors")
WRITTEN = ("config.json", "versions.json", "metrics.jsonl", "events", *CHECKPOINTS)
PACKAGES = ("den-kernels", "torch", "numpy", "safetensors", "scikit-learn")


class RunFolder:
    """The folder of a new run, or of one to be continued, locked against other processes until `close`.

    Nothing in it changes before `begin`.  A context manager.  Of several processes of a run the first one alone reads
    and writes it; all of them must call all methods but `close`.  Where torchrun has started them anew, a run of the
    same launch is continued though `resume` was not given.

    Attributes:
        resume: whether the run is continued.

    Raises ValueError for a folder that cannot be written, that another process trains in, or that holds anything which
    a new run would replace; for a continued run, one without a checkpoint or with other settings.
    """

    def __init__(self, config: RunConfig, *, resume: bool) -> None:
        self.config = config
        self.path = Path(config.out)
        self.last, self.best = self.path / "last.safetensors", self.path / "best.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        self._events: Any = None  # a SummaryWriter, from the first line on
        self._created = False
        self._lock: RunLock | None = None
        self.resume = ranks.from_first(lambda: self._open(resume))

    def _open(self, resume: bool) -> bool:
        """Lock the folder and check it; returns whether its run is continued."""
        resume = resume or self._is_started_anew()
        if resume and not self.path.is_dir():
            raise ValueError(f"train: out must hold {self.last.name} to be continued, got {self.path}")
        with self._writing():
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)
        try:
            self._check_same() if resume else self._check_free()
        except BaseException:
            self.close()
            raise
        return resume

    def _is_started_anew(self) -> bool:
        """True where torchrun has started this launch anew, and its run has come to a checkpoint here."""
        if not launched.restarts() or not self.last.exists():
            return False
        try:
            return json.loads((self.path / "versions.json").read_bytes())["launch"] == ranks.launch()
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Write the settings and versions; of a continued run those that it goes on with."""
        ranks.from_first(self._begin)

    def _begin(self) -> None:
        with self._writing():
            for name in CHECKPOINTS:
                (self.path / (name + PARTIAL)).unlink(missing_ok=True)  # of a process that was killed while saving
            write_whole(self.path / "config.json", _json(to_dict(self.config)))
            if not self.resume:
                write_whole(self.metrics, b"", sync=False)
            write_whole(self.path / "versions.json", _json({**versions(), "launch": ranks.launch()}), sync=False)

    def load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The last checkpoint's tensors and record; ValueError when damaged, with what the run can go on from."""
        return ranks.from_first(self._load)

    def _load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return load_checkpoint(self.last)
        except ValueError as error:
            for name in CHECKPOINTS[1:]:
                with contextlib.suppress(ValueError):
                    updates = read_updates(self.path / name)
                    break
            else:
                raise
            raise ValueError(f"{error} ({name} is whole, after {updates} updates: {self._way_on([name])})") from error

    def rewind(self, epoch: int) -> None:
        """Drop lines that are not whole, and the metrics of epochs after `epoch`, unknown to the checkpoint."""
        ranks.from_first(lambda: self._rewind(epoch))

    def _rewind(self, epoch: int) -> None:
        lines = _whole_lines(self.metrics) if self.metrics.exists() else []
        kept = [line for line in lines if line["epoch"] <= epoch]
        with self._writing():
            write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, on the disk when this returns, and its numbers to TensorBoard at step
        line["step"]."""
        ranks.from_first(lambda: self._log(line))

    def _log(self, line: dict[str, Any]) -> None:
        with self._writing():
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self._events is None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(self.path / "events"), purge_step=line["step"])
            for name, value in flattened(line).items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._events.add_scalar(name.replace(".", "/"), value, line["step"])

    def close(self) -> None:
        """Give the folder back; one that was made for a run that never began goes."""
        try:
            if self._events is not None:
                events, self._events = self._events, None
                with self._writing():
                    events.close()
        finally:
            if self._lock is not None:
                self._lock.release()
            if self._created:
                with contextlib.suppress(OSError):
                    self.path.rmdir()  # only an empty one can be removed

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Context that turns an OSError into a ValueError of one line."""
        try:
            yield
        except OSError as error:
            raise ValueError(f"train: out must be a folder that can be written, got {self.path}: {error}") from error

    def _check_free(self) -> None:
        """Raise ValueError where the folder holds a run; one broken off before its first checkpoint may be repeated."""
        found = [name for name in WRITTEN if (self.path / name).exists()]
        if checkpoints := [name for name in found if name in CHECKPOINTS]:
            raise ValueError(
                f"train: out must be a folder without a run, got {self.path} ({self._way_on(checkpoints)})"
            )
        if found and not self._is_broken_off():
            raise ValueError(
                f"train: out must be a folder without {', '.join(found)}, which would be replaced, got {self.path}"
                " (choose another --out)"
            )

    def _is_broken_off(self) -> bool:
        if self.metrics.exists() and self.metrics.stat().st_size:
            return False
        try:
            return not self._changes(read_config(type(self.config), self.path / "config.json"))
        except ValueError:
            return False

    def _check_same(self) -> None:
        if not self.last.exists():
            found = [name for name in CHECKPOINTS if (self.path / name).exists()]
            way = f" ({self._way_on(found)})" if found else ""
            raise ValueError(f"train: out must hold {self.last.name} to be continued, got {self.path}{way}")
        stored = read_config(type(self.config), self.path / "config.json")
        for key, (before, now) in self._changes(stored).items():
            raise ValueError(f"train: {key} must stay {before} to continue {self.path}, got {now}")

    def _changes(self, stored: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that must stay and do not, with their stored and present values."""
        before, now = flattened(to_dict(stored)), flattened(to_dict(self.config))
        return {k: (before[k], now[k]) for k in before if k not in MAY_DIFFER and before[k] != now[k]}

    def _way_on(self, found: list[str]) -> str:
        if self.last.name in found:
            return "continue it with --resume"
        return f"to continue the run from {found[0]}, copy that file to {self.last.name} and use --resume"


def stored_config(path: Path) -> TrainConfig:
    """The settings of the run in folder `path`; ValueError when there is none."""
    return read_config(TrainConfig, Path(path) / "config.json")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without those that were not written to their ends."""
    return _whole_lines(Path(path) / "metrics.jsonl")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of metrics: what a full disk or a power cut has left of others is passed over."""
    lines = []
    for text in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("epoch"), int):
                lines.append(line)
    return lines


def versions() -> dict[str, str]:
    """Versions of everything that numbers may depend on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
