"""A run of `den dag train`, opened to be measured."""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from den.dag.config import DagTrainConfig
from den.data.inputs import Inputs
from den.recipes.dag.recipe import Network, load_network
from den.runs.state import Training, check_kind, training_of
from den.support.settings import from_dict, read_config
from den.train.checkpoint import read_record


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """Run of a DAG network, as `open_run` found it in a folder."""

    path: Path
    config: DagTrainConfig
    model: Network  # in evaluation mode
    state: Training | None  # how far it has come; None: the checkpoint does not say
    versions: dict[str, str]  # that it was trained with; empty where they are lost
    inputs: dict[str, Inputs] = field(default_factory=dict)  # how pictures become images of a task, where it is known


def open_run(path: Path) -> OpenedRun:
    """The last checkpoint of a run; ValueError where there is none, or one of other settings or another command."""
    check_kind(path, "dag")
    config = read_config(DagTrainConfig, path / "config.json")
    checkpoint = path / "last.safetensors"
    state = training_of(path, config)
    stored = read_record(checkpoint).get("inputs", {})
    inputs = {name: from_dict(Inputs, values, f"{checkpoint}: inputs") for name, values in stored.items()}
    return OpenedRun(path, config, load_network(checkpoint), state, _versions(path / "versions.json"), inputs)


def import_modules(names: Sequence[str]) -> None:
    """Import modules, of the current folder too, such as one that registers kinds of tasks.

    Raises ValueError for one that cannot be imported.
    """
    for name in names:
        sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name.removesuffix(".py"))
        except Exception as error:
            raise ValueError(f"run: modules must be importable, got {name}: {error}") from error
        finally:
            sys.path.remove(os.getcwd())


def _versions(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
