"""Progress of a run's training: a measurement of an unfinished run is marked as such."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from den.dag.config import DagTrainConfig
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.recipes import METHODS, method_of
from den.recipes.dag.phases import search_phases
from den.train.checkpoint import read_record
from den.train.config import TrainConfig
from den.train.phases import Phase, run_phases

COMMANDS = {"model": "den train", "dag": "den dag train"}  # by what the record of a checkpoint holds


@dataclass(frozen=True)
class Training:
    """The updates of a run at its last checkpoint."""

    updates: int
    planned: int  # at most, where a phase ends when it has converged
    finished: bool

    @property
    def words(self) -> str:
        """Progress as reports tell it: "unfinished: 40 of 4,000 updates"; empty for a finished run."""
        return "" if self.finished else f"unfinished: {self.updates:,} of {self.planned:,} updates"


def training_of(folder: Path, config: TrainConfig | DagTrainConfig, checkpoint: str = "last") -> Training | None:
    """Progress of the run in a folder: by its last checkpoint, by `checkpoint` where that is lost.

    None where the checkpoint does not say.

    Raises:
        ValueError: no checkpoint, or one of other settings.
    """
    last = folder / "last.safetensors"
    record = read_record(last if last.exists() else folder / f"{checkpoint}.safetensors")
    phase, updates = position_of(record)
    if phase is None:
        return None
    phases = phases_of(config, record)
    planned = sum(each.settings.steps for each in phases)
    if phase > len(phases) or updates > planned:
        raise ValueError(
            f"run: config.json of {folder} must be of the run that the checkpoint is of, got one of {len(phases)}"
            f" phases and {planned:,} updates with a checkpoint after {phase} and {updates:,}"
        )
    return Training(updates, planned, phase == len(phases))


def position_of(record: dict[str, Any]) -> tuple[int | None, int]:
    """Phases and updates done, of a checkpoint's record; None where it does not tell the phases."""
    position = record.get("position")
    position = position if isinstance(position, dict) else {}
    done, updates = position.get("phase", position.get("stage")), position.get("total_steps")
    return (done, updates) if isinstance(done, int) and isinstance(updates, int) else (None, 0)


def phases_of(config: TrainConfig | DagTrainConfig, record: dict[str, Any]) -> Sequence[Phase]:
    """The phases of a run; those of some compared methods depend on the network that the record describes."""
    if isinstance(config, DagTrainConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of was told when the run began
            return search_phases(config)
    if config.mode not in METHODS:
        return run_phases(config)
    with torch.random.fork_rng(devices=[]):
        return method_of(DeepElasticNetwork(ModelConfig.from_dict(record["model"])), config).phases()


def check_kind(folder: Path, kind: str) -> None:
    """Raise ValueError for the run of another command; `kind`: a key of `COMMANDS`.  A folder without a run passes."""
    path = folder / "last.safetensors"
    if not path.is_file():
        return
    record = read_record(path)
    if kind in record:
        return
    for other, command in COMMANDS.items():
        if other in record:
            measured = "den dag report" if other == "dag" else "den evaluate or den report"
            raise ValueError(
                f"run: {folder} must be a run of {COMMANDS[kind]}, got one of {command}: measure it with {measured}"
            )
    raise ValueError(f"run: {path} must be a checkpoint of {COMMANDS[kind]}, got one without {kind!r}")
