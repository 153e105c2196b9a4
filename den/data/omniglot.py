"""Omniglot: one alphabet is one task, whose classes are its characters (Lake, Salakhutdinov, Tenenbaum, 2015).

Two layouts are read from a data root:

- the official archives, as they are or unpacked: `images_background.zip` and `images_evaluation.zip`, in which
  `images_background/Alphabet_name/character01/0001_01.png` is drawer 1's character; 50 alphabets, 105x105;
- packed pieces `omniglot_small.{split}*.npz`, see `den.data.pieces`; 8 alphabets.

Drawers 1 to 15 of every character are the training split, 16 to 20 the test split; this split is not official.  Ink is
white on black, as in the other sets.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from den.data.images import ImageSet, pixel_moments
from den.data.pieces import find_pieces, open_pieces

ARCHIVES = ("images_background", "images_evaluation")
TRAIN_DRAWERS = 15
MEMBER = re.compile(r"(?:^|/)(images_(?:background|evaluation))/([^/]+)/character(\d+)/\d+_(\d+)\.png$")


def load_omniglot(root: Path | str | None, split: str, size: int = 28) -> list[ImageSet]:
    """A set per alphabet of what `root` holds: uint8 [n, 1, size, size], labels 0 to characters - 1.

    Images are scaled by averaging over areas.  Normalisation constants are those of the training images of all
    alphabets, for both splits; augmentation shifts and does not mirror.

    Raises ValueError for an unknown split, a size below 1, a root without the set, files that are damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"load_omniglot: split must be 'train' or 'test', got {split!r}")
    if size < 1:
        raise ValueError(f"load_omniglot: size must be at least 1, got {size}")
    root = None if root is None else Path(root)
    wanted = _read(root, split)
    train = wanted if split == "train" else _read(root, "train")
    scaled = {name: _scaled(images, size) for name, (images, _) in train.items()}
    mean, std = pixel_moments(torch.cat(list(scaled.values())))
    sets = []
    for name, (images, labels) in wanted.items():
        pixels = scaled[name] if split == "train" else _scaled(images, size)
        classes = int(max(labels.max(), train[name][1].max())) + 1
        sets.append(ImageSet(name, pixels, labels, classes, mean, std, pad=max(1, size // 14), flip=False))
    return sets


def _read(root: Path | None, split: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Images uint8 [n, H, W] and labels int64 [n] of each alphabet, in the order of their names or numbers."""
    if root is not None and any((root / name).is_dir() or (root / f"{name}.zip").is_file() for name in ARCHIVES):
        return _read_archives(root, split)
    pieces = () if root is None else find_pieces(root, "omniglot_small", split)
    if not pieces:
        raise ValueError(
            "load_omniglot: data root must hold images_background and images_evaluation (folders or .zip) or"
            f" omniglot_small.{split}*.npz, got {root} (use --data-root)"
        )
    packed = open_pieces(pieces)
    images = torch.from_numpy(np.concatenate(list(packed.parts)) * np.uint8(255))  # [N, H, W]
    return _by_alphabet(images, {kind: torch.from_numpy(values).long() for kind, values in packed.labels.items()})


def _read_archives(root: Path, split: str) -> dict[str, tuple[Tensor, Tensor]]:
    from PIL import Image

    found: dict[str, list[tuple[int, int, np.ndarray]]] = {}
    for name, content in _members(root):
        match = MEMBER.search(name)
        if match is None or (int(match[4]) <= TRAIN_DRAWERS) != (split == "train"):
            continue
        try:
            ink = 255 - np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        except OSError as error:
            raise ValueError(f"load_omniglot: {name} must be a PNG, got {error}") from error
        found.setdefault(match[2], []).append((int(match[3]) - 1, int(match[4]), ink))
    if not found:
        raise ValueError(
            f"load_omniglot: archives in {root} must hold {ARCHIVES[0]}/ALPHABET/character01/*.png, got none"
        )
    sets = {}
    for name in sorted(found):
        drawings = sorted(found[name], key=lambda drawing: drawing[:2])
        images = torch.from_numpy(np.stack([ink for _, _, ink in drawings]))
        sets[name] = images, torch.tensor([label for label, _, _ in drawings])
    return sets


def _members(root: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every PNG of the archives."""
    for name in ARCHIVES:
        if (root / name).is_dir():
            for path in sorted((root / name).glob("*/*/*.png")):
                yield path.relative_to(root).as_posix(), path.read_bytes()
        elif (path := root / f"{name}.zip").is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        if member.endswith(".png"):
                            yield member, archive.read(member)
            except (OSError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(f"load_omniglot: {path} must be a complete archive, got {error}") from error


def _by_alphabet(images: Tensor, labels: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Split by `c`; the characters of an alphabet, consecutive in `y`, are numbered from 0."""
    sets = {}
    for alphabet in labels["c"].unique().tolist():
        member = labels["c"] == alphabet
        characters = labels["y"][member]
        sets[f"alphabet{alphabet}"] = images[member], characters - characters.min()
    return sets


def _scaled(images: Tensor, size: int) -> Tensor:  # uint8 [n, H, W] -> uint8 [n, 1, size, size]
    if images.shape[1:] == (size, size):
        return images.unsqueeze(1)
    means = F.adaptive_avg_pool2d(images.unsqueeze(1).float(), size)
    return means.round().to(torch.uint8)
