"""A run of `den dag train`, opened to be measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from den.dag.config import DagTrainConfig
from den.recipes.dag.recipe import Network, load_network
from den.runs.state import Training, check_kind, training_of
from den.support.settings import read_config


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """Run of a DAG network, as `open_run` found it in a folder."""

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


def _versions(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
