"""Tiny-ImageNet (Stanford CS231n): 200 classes of ImageNet, 500 + 50 images of 64x64 pixels each.

Read from the published archive, packed or unpacked; the lists of an unpacked one must fit the pictures beside them.
`tin50` is the part of 50 classes which makes ten kinds of five (`KINDS`; they are ours): with it, packed pieces
`tin50.{split}*.npz` are read as well, see `den.data.pieces`. The test split is the published validation split; that of
the publishers has no labels.
"""

import dataclasses
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
KIND_OF = {TIN50.index(position): kind for kind, members in enumerate(KINDS.values()) for position in members}


def open_tinyimagenet(root: Path, split: str) -> Found:
    """Find a split of all classes, labels `y` in the order of their names; ValueError when `root` does not have it."""
    return _found(root, split, list(range(CLASSES)))


def open_tin50(root: Path, split: str) -> Found:
    """Find a split of 50 classes: labels `y`, the kind `c` of each and its number `k` within that kind.

    Raises ValueError when `root` has the set in neither form.
    """
    both = {part: find_pieces(root, "tin50", piece) for part, piece in (("train", "train"), ("test", "val"))}
    if both[split]:
        return Found((*both["train"], *both["test"]), lambda: _numbered(both[split], (*both["train"], *both["test"])))
    return _found(root, split, TIN50)


def _numbered(pieces: tuple[Path, ...], both: tuple[Path, ...]) -> Pixels:
    """Pieces of one split; classes are numbered within their kind by those of both: either may lack some."""
    opened, known = (open_pieces(each, {"y": len(TIN50), "c": len(KINDS)}) for each in (pieces, both))
    kinds: dict[int, int] = {}
    for y, c in sorted(set(zip(known.labels["y"].tolist(), known.labels["c"].tolist(), strict=True))):
        if kinds.setdefault(y, c) != c:
            raise ValueError(
                f"load_set: class {y} of tin50 in {both[0].parent} must be of one kind, got {kinds[y]} and {c}"
            )
    own = opened.labels["y"]
    return dataclasses.replace(opened, labels={"y": own, **_kind_labels(own, kinds, both[0])})


def _kind_labels(y: np.ndarray, kinds: dict[int, int], where: Path) -> dict[str, np.ndarray]:
    """Kind `c` and number `k` within it of each label, int64 [N], from the kinds of all classes."""
    members = {c: [label for label in sorted(kinds) if kinds[label] == c] for c in kinds.values()}
    share = len(TIN50) // len(KINDS)
    if large := [c for c, each in members.items() if len(each) > share]:
        raise ValueError(
            f"load_set: kind {large[0]} of tin50 in {where.parent} must be of {share} classes, got"
            f" {len(members[large[0]])}"
        )
    numbers = {label: each.index(label) for each in members.values() for label in each}
    c, k = (np.array([table[label] for label in y.tolist()], np.int64) for table in (kinds, numbers))
    return {"c": c, "k": k}


def _found(root: Path, split: str, classes: list[int]) -> Found:
    archive, place = find(root, "tinyimagenet", [ARCHIVE])
    files = (place / "wnids.txt", place / {"train": "train", "test": "val"}[split]) if place.is_dir() else (place,)
    return Found(files, lambda: _decode(archive, place, split, classes))


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
    labels = {"y": y} if classes != TIN50 else {"y": y, **_kind_labels(y, KIND_OF, place)}
    return Pixels((len(y), SIZE, SIZE, 3), labels, pictures(named, size=(SIZE, SIZE)))


def _training(archive: Archive, place: Path, chosen: list[str], names: list[str]) -> tuple[list[str], np.ndarray]:
    """Files and their labels int64 [N]; each class lists its own."""
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
    """Files and their labels int64 [N], from one list of all classes."""
    (listed,) = read(archive, place, ("val/val_annotations.txt",))
    where, folder = member_name(place, "val/val_annotations.txt"), place / "val" / "images"
    lines = rows("load_set", where, listed, 2)
    if place.is_dir():
        matching("load_set", where, [line[0] for line in lines], picture_names(folder), folder)
    matching("load_set", f"classes of {where}", sorted({line[1] for line in lines}), names, place / "wnids.txt")
    labels = {name: label for label, name in enumerate(chosen)}
    kept = [(f"val/images/{file}", labels[name]) for file, name, *_ in lines if name in labels]
    return [file for file, _ in kept], np.array([label for _, label in kept], np.int64)
