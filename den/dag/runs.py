"""A run of `den dag train`, opened to be measured."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from den.dag.config import DagTrainConfig
from den.dag.engine import STAGES, Network, load_network, stage_steps
from den.runs.state import Training, check_kind, position_of
from den.train.checkpoint import read_record
from den.support.settings import read_config


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """What `open_run` found in a folder."""

    path: Path
    config: DagTrainConfig
    model: Network  # in evaluation mode
    state: Training | None  # how far it has come; None: the checkpoint does not say
    versions: dict[str, str]  # that it was trained with; empty where they are lost


def open_run(path: Path) -> OpenedRun:
    """The last checkpoint of a run; ValueError where there is none, or one of other settings or another command."""
    check_kind(path, "dag")
    config = read_config(DagTrainConfig, path / "config.json")
    checkpoint = path / "last.safetensors"
    state = training_of(path, config)
    return OpenedRun(path, config, load_network(checkpoint), state, _versions(path / "versions.json"))


def training_of(path: Path, config: DagTrainConfig) -> Training | None:
    """How far a run has come, by its last checkpoint; None where that does not say.

    Raises:
        ValueError: no checkpoint, or one of other settings.
    """
    stage, updates = position_of(read_record(path / "last.safetensors"), "stage")
    if stage is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of was told when the run began
        planned = sum(stage_steps(config))
    if stage > len(STAGES) or updates > planned:
        raise ValueError(
            f"run: config.json of {path} must be of the run that the checkpoint is of, got one of {planned:,} updates"
            f" with a checkpoint after {updates:,}"
        )
    return Training(updates, planned, stage == len(STAGES))


def _versions(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
