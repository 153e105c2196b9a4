"""A trained run, opened for inference: its settings, its network, and the rule that gives each image its structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from den.evaluate.accuracy import Choice, Structures
from den.nn.model import DeepElasticNetwork
from den.recipes import METHODS, load_method
from den.train.checkpoint import load_model
from den.train.config import TrainConfig
from den.train.folder import stored_config

Opener = Callable[[Path, TrainConfig], tuple[DeepElasticNetwork, Structures]]
"""Checkpoint and settings -> the network in evaluation mode and its rule; ValueError where the file does not fit."""


@dataclass(frozen=True, eq=False)
class Run:
    """What `open_run` found in a folder."""

    folder: Path
    checkpoint: Path
    config: TrainConfig
    model: DeepElasticNetwork  # in evaluation mode
    structures: Structures

    @property
    def name(self) -> Literal["last", "best"]:
        """Which of the folder's checkpoints it is."""
        return "best" if self.checkpoint.stem == "best" else "last"

    @property
    def choice(self) -> Choice:
        """What `evaluate` is to use: the selector where there is one, for its distributions; else the rule."""
        return "selected" if self.config.mode == "den" else self.structures


def open_run(folder: Path, checkpoint: Literal["last", "best"] = "last") -> Run:
    """The run of a folder that `den train` wrote, on the CPU.

    Raises:
        ValueError: no run there, a checkpoint that is missing, damaged or of another network, an unknown method.
    """
    folder = Path(folder)
    config = stored_config(folder)
    if config.mode not in OPENERS:
        raise ValueError(f"open_run: mode of {folder} must be one of {', '.join(OPENERS)}, got {config.mode!r}")
    path = folder / f"{checkpoint}.safetensors"
    model, structures = OPENERS[config.mode](path, config)
    return Run(folder, path, config, model.eval(), structures)


def _open_den(path: Path, config: TrainConfig) -> tuple[DeepElasticNetwork, Structures]:
    model = load_model(path)
    return model, model.select


def _open_dense(path: Path, config: TrainConfig) -> tuple[DeepElasticNetwork, Structures]:
    return load_model(path), lambda images, task: None


def _open_compared(path: Path, config: TrainConfig) -> tuple[DeepElasticNetwork, Structures]:
    method = load_method(path, config)
    return method.model, method.structures


OPENERS: dict[str, Opener] = {"den": _open_den, "dense": _open_dense, **dict.fromkeys(METHODS, _open_compared)}
"""How each method (a value of `TrainConfig.mode`) is opened."""
