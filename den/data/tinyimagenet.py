"""Tiny-ImageNet (Stanford CS231n): 200 classes of ImageNet, 500 + 50 images of 64x64 pixels each.

Read from the published archive, packed or unpacked.  `tin50` is the part of 50 classes which makes ten kinds of five
(`KINDS`; they are ours): with it, packed pieces `tin50.{split}*.npz` are read as well, see `den.data.pieces`.  The test
split is the published validation split; that of the publishers has no labels.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from den.data.archives import Archive, check, find, read
from den.data.decode import pictures
from den.data.pieces import find_pieces, open_pieces
from den.data.store import Found, Pixels

ARCHIVE = Archive(
    "tiny-imagenet-200.zip",
    "tiny-imagenet-200",
    "http://cs231n.stanford.edu/",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
SIZE = 64
KINDS = {  # of tin50: positions of their classes among the sorted names of all 200
    "dog": (24, 25, 26, 28, 29),
    "cat": (30, 31, 32, 33, 34),
    "hoofed": (49, 50, 51, 52, 53),
    "insect": (36, 38, 39, 43, 44),
    "sea life": (13, 14, 17, 18, 46),
    "road vehicle": (70, 94, 116, 145, 153),
    "clothing": (60, 85, 112, 119, 134),
    "structure": (66, 71, 157, 165, 173),
    "fruit and vegetable": (184, 185, 186, 187, 188),
    "landscape": (194, 195, 196, 197, 198),
}


def open_tinyimagenet(root: Path, split: str) -> Found:
    """All classes, labels `y` in the order of their names; ValueError when `root` does not have it."""
    archive, place = find(root, "tinyimagenet", [ARCHIVE])
    return Found((place,), lambda: _decode(archive, place, split, None))


def open_tin50(root: Path, split: str) -> Found:
    """50 classes, labels `y` and the position `c` of their kind; ValueError when `root` has it in neither form."""
    if pieces := find_pieces(root, "tin50", {"train": "train", "test": "val"}[split]):
        return Found(pieces, lambda: open_pieces(pieces))
    archive, place = find(root, "tinyimagenet", [ARCHIVE])
    classes = sorted(itertools.chain(*KINDS.values()))
    return Found((place,), lambda: _decode(archive, place, split, classes))


def _decode(archive: Archive, place: Path, split: str, classes: list[int] | None) -> Pixels:
    check(archive, place)
    (listed,) = read(archive, place, ("wnids.txt",))
    names = sorted(listed.decode().split())
    chosen = range(len(names)) if classes is None else classes
    if max(chosen) >= len(names):
        raise ValueError(f"load_set: wnids.txt of {place} must list 200 classes, got {len(names)}")
    listing = _training if split == "train" else _validation
    labelled = listing(archive, place, [names[k] for k in chosen])
    files, y = [file for file, _ in labelled], np.array([label for _, label in labelled])
    kind_of = {k: kind for kind, members in enumerate(KINDS.values()) for k in members}
    labels = {"y": y} if classes is None else {"y": y, "c": np.array([kind_of[k] for k in classes])[y]}
    parts = pictures(zip(files, read(archive, place, files), strict=True))
    return Pixels((len(y), SIZE, SIZE, 3), labels, parts)


def _training(archive: Archive, place: Path, names: list[str]) -> list[tuple[str, int]]:
    """Files and labels; each class lists its own."""
    boxes = read(archive, place, [f"train/{name}/{name}_boxes.txt" for name in names])
    return [
        (f"train/{name}/images/{line.split()[0]}", label)
        for label, (name, listed) in enumerate(zip(names, boxes, strict=True))
        for line in listed.decode().splitlines()
    ]


def _validation(archive: Archive, place: Path, names: list[str]) -> list[tuple[str, int]]:
    (listed,) = read(archive, place, ("val/val_annotations.txt",))
    labels = {name: label for label, name in enumerate(names)}
    rows = [line.split("\t") for line in listed.decode().splitlines()]
    return [(f"val/images/{file}", labels[name]) for file, name, *_ in rows if name in labels]
