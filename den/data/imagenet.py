"""Fifty classes of ImageNet, as the paper's Mini-ImageNet (section 4.1): 800 training images of each.

Two layouts are read; pictures are scaled once, to 224x224 (centre of 256x256) or any other square:

- `imagenet50`: a folder `imagenet50/{train,val}/CLASS/*` of the fifty classes that one wants, pictures as published by
  ImageNet; the first 800 of a class in the order of their names are its training images;
- `miniimagenet`: the Mini-ImageNet of Ravi and Larochelle (ICLR 2017), `mini-imagenet/images/*.jpg` and `train.csv`,
  `val.csv`, `test.csv` of lines "filename,label" beside that folder: the first fifty classes in the order of their
  names; the last sixth of the images of a class (100 of 600) are the test split.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from den.data.checks import blamed, matching, text
from den.data.decode import picture_names, pictures, square
from den.data.store import Found, Pixels

CLASSES = 50
TRAIN_IMAGES = 800
PAGES = {"imagenet50": "https://www.image-net.org/", "miniimagenet": "https://github.com/renmengye/few-shot-ssl-public"}
LISTS = ("train.csv", "val.csv", "test.csv")


def open_imagenet50(root: Path, split: str, size: int) -> Found:
    """Labels `y` by the names of the folders; ValueError when these are not fifty, or not those of the other split."""
    folders = {part: root / "imagenet50" / part for part in ("train", "val")}
    classes = {part: _folder_names(folder) for part, folder in folders.items()}
    for part, names in classes.items():
        if len(names) != CLASSES:
            raise ValueError(
                f"load_set: data root of 'imagenet50' must hold imagenet50/train/CLASS/* and imagenet50/val/CLASS/* of"
                f" {CLASSES} classes, got {len(names)} in {folders[part]} (get ImageNet from {PAGES['imagenet50']})"
            )
    if other := set(classes["val"]) - set(classes["train"]):
        raise ValueError(
            f"load_set: classes of {folders['val']} must be those of {folders['train']}, got {min(other)}"
            f" ({len(other)} differ)"
        )
    folder = folders["train" if split == "train" else "val"]
    return Found((folder,), lambda: _decode(*_imagenet50_files(folder, split), size))


def _folder_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _imagenet50_files(folder: Path, split: str) -> tuple[list[Path], list[int]]:
    files, labels = [], []
    for label, name in enumerate(_folder_names(folder)):
        found = picture_names(folder / name)
        found = found[:TRAIN_IMAGES] if split == "train" else found
        if not found:
            raise ValueError(f"load_set: {folder / name} must hold pictures, got none; the folder is unpacked by half")
        files += [folder / name / file for file in found]
        labels += [label] * len(found)
    return files, labels


def open_miniimagenet(root: Path, split: str, size: int) -> Found:
    """Labels `y` by the names of the classes; ValueError when a list is missing; see `_miniimagenet_files`."""
    folder = root / "mini-imagenet"
    lists = [folder / name for name in LISTS]
    if missing := [path.name for path in lists if not path.is_file()]:
        raise ValueError(
            f"load_set: data root of 'miniimagenet' must hold mini-imagenet/images and train.csv, val.csv, test.csv"
            f" beside it, got {folder} without {', '.join(missing)}"
        )
    return Found((*lists, folder / "images"), lambda: _decode(*_miniimagenet_files(folder, split), size))


def _miniimagenet_files(folder: Path, split: str) -> tuple[list[Path], list[int]]:
    """ValueError when a list is malformed, the lists do not fit the pictures, or the classes are not of one size."""
    by_class: dict[str, list[str]] = {}
    for name in LISTS:
        for file, kind in _listed(folder / name):
            by_class.setdefault(kind, []).append(file)
    if len(by_class) < CLASSES:
        raise ValueError(f"load_set: lists in {folder} must hold at least {CLASSES} classes, got {len(by_class)}")
    images, lists = folder / "images", f"{', '.join(LISTS)} of {folder}"
    matching("load_set", lists, [file for files in by_class.values() for file in files], picture_names(images), images)
    sizes = {kind: len(files) for kind, files in by_class.items()}
    if len(set(sizes.values())) > 1:
        few, many = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"load_set: {lists} must hold as many images of every class, got {sizes[few]} of {few} and"
            f" {sizes[many]} of {many}"
        )
    files, labels = [], []
    for label, name in enumerate(sorted(by_class)[:CLASSES]):
        kept = len(by_class[name]) - len(by_class[name]) // 6
        chosen = by_class[name][:kept] if split == "train" else by_class[name][kept:]
        files += [images / image for image in chosen]
        labels += [label] * len(chosen)
    if not files:
        raise ValueError(f"load_set: {lists} must hold at least 6 images of a class, got {sizes}")
    return files, labels


def _listed(path: Path) -> list[tuple[str, str]]:
    """Files and classes of a list; ValueError that names it and the line when it is malformed."""
    with blamed("load_set", path, "be readable"):
        content = path.read_bytes()
    with blamed("load_set", path, "be a table of comma-separated values"):
        lines = [row for row in csv.reader(io.StringIO(text("load_set", path, content)), strict=True) if any(row)]
    header = [name.strip() for name in lines[0]] if lines else []
    if not {"filename", "label"} <= set(header):
        raise ValueError(f"load_set: {path} must begin with a line filename,label, got {','.join(header)[:80]!r}")
    file, label = header.index("filename"), header.index("label")
    found = []
    for row in lines[1:]:
        if len(row) != len(header) or not (row[file].strip() and row[label].strip()):
            raise ValueError(f"load_set: lines of {path} must have {','.join(header)}, got {','.join(row)[:80]!r}")
        found.append((row[file].strip(), row[label].strip()))
    return found


def _decode(files: list[Path], labels: list[int], size: int) -> Pixels:
    """Each file is read when its turn comes."""
    parts = pictures(_contents(files), fit=square(size))
    return Pixels((len(files), size, size, 3), {"y": np.array(labels)}, parts)


def _contents(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        with blamed("load_set", path, "be readable", hint="; unpack the set again"):
            content = path.read_bytes()
        yield str(path), content
