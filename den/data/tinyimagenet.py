"""Tiny-ImageNet (Stanford CS231n): 200 classes of ImageNet, 500 + 50 images of 64x64 pixels each.

Read from the published archive, packed or unpacked; the lists of an unpacked one must fit the pictures beside them.
`tin50` is the part of 50 classes which makes ten kinds of five (`KINDS`; they are ours): with it, packed pieces
`tin50.{split}*.npz` are read as well, see `den.data.pieces`.  The test split is the published validation split; that of
the publishers has no labels.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from den.data.archives import Archive, check, find, member_name, read
from den.data.checks import all_classes, matching, rows
from den.data.decode import picture_names, pictures
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
CLASSES = 200
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
TIN50 = sorted(itertools.chain(*KINDS.values()))
GROUPS = tuple(tuple(map(TIN50.index, members)) for members in KINDS.values())  # of labels of tin50, by kind


def open_tinyimagenet(root: Path, split: str) -> Found:
    """All classes, labels `y` in the order of their names; ValueError when `root` does not have it."""
    return _found(root, split, list(range(CLASSES)))


def open_tin50(root: Path, split: str) -> Found:
    """50 classes, labels `y` in the order of their names (kind k is `GROUPS[k]`); ValueError when `root` has it in
    neither form."""
    if pieces := find_pieces(root, "tin50", {"train": "train", "test": "val"}[split]):
        return Found(pieces, lambda: _checked_kinds(pieces))
    return _found(root, split, TIN50)


def _found(root: Path, split: str, classes: list[int]) -> Found:
    archive, place = find(root, "tinyimagenet", [ARCHIVE])
    files = (place / "wnids.txt", place / {"train": "train", "test": "val"}[split]) if place.is_dir() else (place,)
    return Found(files, lambda: _decode(archive, place, split, classes))


def _checked_kinds(pieces: tuple[Path, ...]) -> Pixels:
    opened = open_pieces(pieces, {"y": len(TIN50), "c": len(KINDS)})
    kind_of = np.array([kind for y in range(len(TIN50)) for kind, group in enumerate(GROUPS) if y in group])
    wrong = (kind_of[opened.labels["y"]] != opened.labels["c"]).nonzero()[0]
    if len(wrong):
        y, c = (opened.labels[kind][wrong[0]] for kind in ("y", "c"))
        raise ValueError(f"load_set: class {y} in {pieces[0].parent} must be of kind {kind_of[y]} of tin50, got {c}")
    return opened


def _decode(archive: Archive, place: Path, split: str, classes: list[int]) -> Pixels:
    """The images of some of the classes, labelled by the places of these in `classes`."""
    check(archive, place)
    (listed,) = read(archive, place, ("wnids.txt",))
    where = member_name(place, "wnids.txt")
    lines = rows("load_set", where, listed, 1)
    names = sorted({line[0] for line in lines})
    if not len(names) == len(lines) == CLASSES or any(len(line) > 1 for line in lines):
        raise ValueError(
            f"load_set: {where} must list {CLASSES} classes, one a line, got {len(names)} in {len(lines)} lines"
        )
    files, y = (_training if split == "train" else _validation)(archive, place, [names[k] for k in classes], names)
    all_classes("load_set", f"lists of {split} in {place}", y, len(classes))
    named = (
        (member_name(place, file), content) for file, content in zip(files, read(archive, place, files), strict=True)
    )
    return Pixels((len(y), SIZE, SIZE, 3), {"y": y}, pictures(named, size=(SIZE, SIZE)))


def _training(archive: Archive, place: Path, chosen: list[str], names: list[str]) -> tuple[list[str], np.ndarray]:
    """Files and labels; each class lists its own."""
    if place.is_dir():
        folders = [path.name for path in (place / "train").glob("[!.]*") if path.is_dir()]
        matching("load_set", place / "wnids.txt", names, folders, place / "train")
    lists = [f"train/{name}/{name}_boxes.txt" for name in chosen]
    files, y = [], []
    for label, (name, path, content) in enumerate(zip(chosen, lists, read(archive, place, lists), strict=True)):
        own = [line[0] for line in rows("load_set", member_name(place, path), content, 1)]
        folder = f"train/{name}/images"
        if place.is_dir():
            matching("load_set", place / path, own, picture_names(place / folder), place / folder)
        files += [f"{folder}/{file}" for file in own]
        y += [label] * len(own)
    return files, np.array(y, np.int64)


def _validation(archive: Archive, place: Path, chosen: list[str], names: list[str]) -> tuple[list[str], np.ndarray]:
    """Files and labels, from one list of all classes."""
    (listed,) = read(archive, place, ("val/val_annotations.txt",))
    where, folder = member_name(place, "val/val_annotations.txt"), place / "val" / "images"
    lines = rows("load_set", where, listed, 2)
    if place.is_dir():
        matching("load_set", where, [line[0] for line in lines], picture_names(folder), folder)
    matching("load_set", f"classes of {where}", sorted({line[1] for line in lines}), names, place / "wnids.txt")
    labels = {name: label for label, name in enumerate(chosen)}
    kept = [(f"val/images/{file}", labels[name]) for file, name, *_ in lines if name in labels]
    return [file for file, _ in kept], np.array([label for _, label in kept], np.int64)
