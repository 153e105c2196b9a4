"""A trained run, opened for inference: its settings, its network, and the rule that gives each image its structure."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from den.data import ImageSet
from den.data.images import Kept
from den.evaluate.accuracy import Choice, Structures
from den.nn.model import DeepElasticNetwork
from den.recipes import RECIPES, load_method
from den.support.settings import from_dict
from den.train.checkpoint import read_record, reading
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
    kept: dict[str, Kept] = field(default_factory=dict)  # of each task's images; empty in older runs

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
    return Run(folder, path, config, method.model, method.structures, kept_of(path))


def kept_of(checkpoint: Path) -> dict[str, Kept]:
    """Facts of the images of each task, of a checkpoint; none in older ones."""
    with reading(checkpoint):
        data = read_record(checkpoint).get("data", {})
        return {name: from_dict(Kept, values, "data") for name, values in data.items()}


def as_trained(image_set: ImageSet, kept: Kept | None) -> ImageSet:
    """A set normalised as a run's images were; None: it is not known. ValueError for other classes than the run's."""
    if kept is None or kept == image_set.kept:
        return image_set
    if kept.class_names and image_set.class_names and kept.class_names != image_set.class_names:
        strange = {*kept.class_names} ^ {*image_set.class_names}
        raise ValueError(
            f"evaluate: classes of {image_set.name} must be those that the run has learnt, got others:"
            f" {', '.join(sorted(strange)[:5])}"
        )
    return dataclasses.replace(image_set, mean=kept.mean, std=kept.std)
