"""Pictures as the images of a task, as its training images did: what a run remembers of its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from den.data.checks import blamed
from den.data.decode import opened, picture_names, rgb, squared, upright
from den.data.images import ImageSet, Kept
from den.data.scenes import MEAN, STD, SceneSet
from den.nn.tasks import Task

PAPER = 127  # mean grey above which a drawing is taken for ink on paper


@dataclass(frozen=True)
class Inputs(Kept):
    """Facts about a task's images that a network needs to be given pictures."""

    ink: bool = False  # True where the set has white ink on black: dark ink on paper is turned


def inputs_of(images: ImageSet | SceneSet, ink: bool = False) -> Inputs:
    """The constants of a set."""
    if isinstance(images, ImageSet):
        return Inputs(tuple(images.mean), tuple(images.std), images.class_names, ink)
    return Inputs(MEAN, STD)


def picture_files(given: Sequence[Path]) -> list[Path]:
    """The files, and the pictures of the folders; ValueError for what is neither."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            files += [path / name for name in picture_names(path)]
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"dag predict: pictures must be files or folders, got {path}")
    if not files:
        raise ValueError(f"dag predict: pictures must be at least one, got none in [{', '.join(map(str, given))}]")
    return files


def as_inputs(files: Sequence[Path], task: Task, inputs: Inputs) -> Tensor:
    """Pictures scaled to the task's size and normalised: float32 [n, C, H, W], channels-last in memory.

    Of a classification the square about their centre.  Raises ValueError for a file that is no picture.
    """
    channels, height, width = task.shape
    if channels not in (1, 3):
        raise ValueError(f"dag predict: images of {task.name} must have 1 or 3 channels to be pictures, got {channels}")
    parts = []
    for path in files:
        with blamed("dag predict", path, "be a complete picture"):
            if task.dense:
                picture = rgb(upright(opened(path))).resize((width, height), Image.Resampling.BILINEAR)
            else:
                picture = squared(path, height)
            pixels = np.array(picture.convert("RGB" if channels == 3 else "L")).reshape(height, width, channels)
        if inputs.ink and pixels.mean() > PAPER:
            pixels = 255 - pixels
        parts.append(torch.from_numpy(pixels))
    mean, std = torch.tensor(inputs.mean), torch.tensor(inputs.std)
    return ((torch.stack(parts).float() / 255 - mean) / std).permute(0, 3, 1, 2)
