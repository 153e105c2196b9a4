"""Folders of pictures sorted by class, as torchvision's ImageFolder has them: ``PATH/{train,test}/CLASS/picture.jpg``.

``val`` stands for ``test`` where there is no such folder.  Classes are numbered in the order of the names of the
training folders.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from den.data.decode import contents, picture_names, pictures, square
from den.data.images import ImageSet, pixel_moments
from den.data.store import Found, Pixels, stored

PREFIX = "folder:"
SIZE = 64
SPLITS = {"train": ("train",), "test": ("test", "val")}
SAMPLE = 5000  # training images that the means and deviations of the channels are taken from, at most


def split_folder(path: Path, split: str) -> Path:
    """The folder of a split; ValueError where there is none."""
    for name in SPLITS[split]:
        if (path / name).is_dir():
            return path / name
    raise ValueError(f"load_set: folder must hold {' or '.join(SPLITS[split])}, got {path}")


def load_folder(name: str, path: Path, split: str, size: int | None = None) -> ImageSet:
    """A set of pictures scaled to `size` (None: 64) pixels a side, uint8 [N, 3, size, size], decoded once.

    Images are padded by a sixteenth of their side and mirrored in training.

    Raises ValueError for a folder without the split, pictures that are damaged, a class without pictures and, of the
    test split, one that was not trained.
    """
    size, train = size or SIZE, split_folder(path, "train")
    classes = class_names(train)
    if not classes:
        raise ValueError(f"load_set: {train} must hold folders of pictures, one for each class, got none")
    (pixels, labels), key = _read(train, classes, size), split_folder(path, split)
    index = torch.linspace(0, len(pixels) - 1, min(len(pixels), SAMPLE)).long()
    mean, std = pixel_moments(pixels[index])
    if split != "train":
        pixels, labels = _read(key, classes, size)
    return ImageSet(name, pixels, labels, len(classes), mean, std, pad=size // 16, class_names=classes)


def class_names(folder: Path) -> tuple[str, ...]:
    """Sorted names of the folders in a folder, hidden ones left out."""
    return tuple(sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")))


def _read(folder: Path, classes: tuple[str, ...], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 3, size, size] and labels int64 [N] of a split."""
    if unknown := sorted(set(class_names(folder)) - set(classes)):
        raise ValueError(f"load_set: {folder} must hold classes of the training split only, got {unknown[0]}")
    images, labels = stored(Found((folder,), partial(_decode, folder, classes, size)), folder.parent,
                            f"{folder.name}-{size}")  # fmt: skip
    return images, labels["y"]


def _decode(folder: Path, classes: tuple[str, ...], size: int) -> Pixels:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = picture_names(folder / name)
        if not found and folder.name == "train":
            raise ValueError(f"load_set: {folder / name} must hold pictures, got none")
        files += [folder / name / each for each in found]
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"load_set: {folder} must hold pictures, got none")
    return Pixels((len(files), size, size, 3), {"y": np.array(labels)}, pictures(contents(files), fit=square(size)))
