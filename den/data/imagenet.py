"""Fifty classes of ImageNet, as the paper's Mini-ImageNet (section 4.1): 800 training images of each.

Two layouts are read; pictures are scaled once, to 224x224 (centre of 256x256) or any other square:

- `imagenet50`: a folder `imagenet50/{train,val}/CLASS/*` of the fifty classes that one wants, pictures as published by
  ImageNet; the first 800 of a class in the order of their names are its training images;
- `miniimagenet`: the Mini-ImageNet of Ravi and Larochelle (ICLR 2017), `mini-imagenet/images/*.jpg` and `train.csv`,
  `val.csv`, `test.csv` of lines "filename,label" beside that folder: the first fifty classes in the order of their
  names; the last sixth of the images of a class (100 of 600) are the test split.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from den.data.decode import pictures, square
from den.data.store import Found, Pixels

CLASSES = 50
TRAIN_IMAGES = 800
PAGES = {"imagenet50": "https://www.image-net.org/", "miniimagenet": "https://github.com/renmengye/few-shot-ssl-public"}
SUFFIXES = (".jpeg", ".jpg", ".png")


def open_imagenet50(root: Path, split: str, size: int) -> Found:
    """Labels `y` by the names of the folders; ValueError when there are not fifty, or one of them is empty."""
    folder = root / "imagenet50" / {"train": "train", "test": "val"}[split]
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) != CLASSES:
        raise ValueError(
            f"load_set: data root of 'imagenet50' must hold imagenet50/train/CLASS/* and imagenet50/val/CLASS/* of"
            f" {CLASSES} classes, got {len(classes)} in {folder} (get ImageNet from {PAGES['imagenet50']})"
        )
    files, labels = [], []
    for label, path in enumerate(classes):
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        found = found[:TRAIN_IMAGES] if split == "train" else found
        if not found:
            raise ValueError(f"load_set: {path} must hold pictures, got none; the folder is unpacked by half")
        files += found
        labels += [label] * len(found)
    return Found(tuple(classes), lambda: _decode(files, labels, size))


def open_miniimagenet(root: Path, split: str, size: int) -> Found:
    """Labels `y` by the names of the classes; ValueError when a list, or a picture that it names, is missing."""
    folder = root / "mini-imagenet"
    lists = [folder / f"{name}.csv" for name in ("train", "val", "test")]
    if missing := [path.name for path in lists if not path.is_file()]:
        raise ValueError(
            f"load_set: data root of 'miniimagenet' must hold mini-imagenet/images and train.csv, val.csv, test.csv"
            f" beside it, got {folder} without {', '.join(missing)}"
        )
    by_class: dict[str, list[str]] = {}
    for path in lists:
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
            by_class.setdefault(row["label"], []).append(row["filename"])
    files, labels = [], []
    for label, name in enumerate(sorted(by_class)[:CLASSES]):
        images = by_class[name]
        kept = len(images) - len(images) // 6
        chosen = images[:kept] if split == "train" else images[kept:]
        files += [folder / "images" / image for image in chosen]
        labels += [label] * len(chosen)
    return Found(tuple(lists), lambda: _decode(files, labels, size))


def _decode(files: list[Path], labels: list[int], size: int) -> Pixels:
    """Each file is read when its turn comes."""
    parts = pictures(_contents(files), square(size))
    return Pixels((len(files), size, size, 3), {"y": np.array(labels)}, parts)


def _contents(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        try:
            yield str(path), path.read_bytes()
        except OSError as error:
            raise ValueError(f"load_set: {path} must be readable, got {error}; unpack the set again") from error
