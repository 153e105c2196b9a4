"""A trained run, opened for inference: its settings, its network, and the rule that gives each image its structure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from den.evaluate.accuracy import Choice, Structures
from den.nn.model import DeepElasticNetwork
from den.recipes import RECIPES, load_method
from den.train.config import TrainConfig
from den.train.folder import stored_config


@dataclass(frozen=True, eq=False)
class Run:
    """Trained run, as `open_run` found it in a folder."""

    folder: Path
    checkpoint: Path
    config: TrainConfig
    model: DeepElasticNetwork  # in evaluation mode
    structures: Structures

    @property
    def name(self) -> Literal["last", "best"]:
        """Name of the checkpoint that was opened."""
        return "best" if self.checkpoint.stem == "best" else "last"

    @property
    def choice(self) -> Choice:
        """Argument for `evaluate`: the selector where there is one, for its distributions; else the rule."""
        return "selected" if self.config.mode == "den" else self.structures


def open_run(folder: Path, checkpoint: Literal["last", "best"] = "last") -> Run:
    """The run of a folder that `den train` wrote, on the CPU.

    Raises:
        ValueError: no run there, a checkpoint that is missing, damaged or of another network, an unknown method.
    """
    folder = Path(folder)
    config = stored_config(folder)
    if config.mode not in RECIPES:
        raise ValueError(f"open_run: mode of {folder} must be one of {', '.join(RECIPES)}, got {config.mode!r}")
    path = folder / f"{checkpoint}.safetensors"
    method = load_method(path, config)
    return Run(folder, path, config, method.model, method.structures)
