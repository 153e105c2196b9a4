"""Omniglot: one alphabet is one task, whose classes are its characters (Lake, Salakhutdinov, Tenenbaum, 2015).

Two layouts are read from a data root:

- the official archives, as they are or unpacked: `images_background.zip` and `images_evaluation.zip`, in which
  `images_background/Alphabet_name/character01/0001_01.png` is drawer 1's character; 50 alphabets, 105x105; where both
  are there, the archive is read;
- packed pieces `omniglot_small.{split}*.npz`, see `den.data.pieces`; 8 alphabets.

Two protocols: `drawers`, of all alphabets that are there drawers 1 to 15 of every character for training and 16 to 20
for testing, which is ours; and `mtl20`, on which multi-task papers report (Meyerson and Miikkulainen, ICLR 2018, and
others after them): a fixed random subset of 20 of the 50 alphabets, of every character 10 drawings for training, 4 for
validation and 6 for testing. The papers do not name their subset; this one is drawn with the seed 0, as are the splits.
Ink is white on black, as in the other sets.
"""

import io
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from den.data.archives import holds_anything
from den.data.checks import blamed
from den.data.decode import opened, rgb
from den.data.images import ImageSet, pixel_moments
from den.data.pieces import find_pieces, open_pieces

ARCHIVES = ("images_background", "images_evaluation")
ALPHABETS, CHARACTERS = 50, 1623
DRAWERS, TRAIN_DRAWERS = 20, 15
SPLITS = {"drawers": ("train", "test"), "mtl20": ("train", "validation", "test")}  # by protocol
SIDES = {"drawers": 28, "mtl20": 105}  # that images are scaled to where nothing else is said
SUBSET, SHARES = 20, {"train": (0, 10), "validation": (10, 14), "test": (14, 20)}  # of mtl20: alphabets; drawings
MEMBER = re.compile(r"(?:^|/)images_(?:background|evaluation)/([^/]+)/character(\d+)/\d+_(\d+)\.png$", re.IGNORECASE)
PICTURE = re.compile(r"(?:^|/)character[^/]*/[^./][^/]*\.png$", re.IGNORECASE)  # drawings, also those of other names


Drawings = dict[str, tuple[Tensor, Tensor]]
"""Of each alphabet: images uint8 [n, H, W] and labels int64 [n]."""


def load_omniglot(
    root: Path | str | None, split: str, size: int | None = None, protocol: str = "drawers"
) -> list[ImageSet]:
    """A set per alphabet of a protocol: uint8 [n, 1, size, size], labels 0 to characters - 1.

    Images are scaled by averaging over areas, to 28 pixels (`mtl20`: left at 105) where no size is given. Normalisation
    constants are those of the training images of all alphabets, for every split; augmentation shifts and does not
    mirror.

    Raises ValueError for an unknown protocol or split, a size below 1, a root without the set (of `mtl20`: without all
    of its 50 alphabets), files that are damaged, characters that lack a drawing which others have, and splits of
    different characters.
    """
    if protocol not in SPLITS:
        raise ValueError(f"load_omniglot: protocol must be one of {', '.join(SPLITS)}, got {protocol!r}")
    if split not in SPLITS[protocol]:
        raise ValueError(f"load_omniglot: split must be one of {', '.join(SPLITS[protocol])}, got {split!r}")
    size = SIDES[protocol] if size is None else size
    if size < 1:
        raise ValueError(f"load_omniglot: size must be at least 1, got {size}")
    root = None if root is None else Path(root)
    if protocol == "mtl20":
        parts = mtl20(root)
        train, wanted = parts["train"], parts[split]
    else:
        wanted = _read(root, split)
        train = wanted if split == "train" else _read(root, "train")
        _same_characters(root, train, wanted)
    scaled = {name: _scaled(images, size) for name, (images, _) in train.items()}
    mean, std = pixel_moments(torch.cat(list(scaled.values())))
    sets = []
    for name, (images, labels) in wanted.items():
        pixels = scaled[name] if split == "train" else _scaled(images, size)
        first, last = (int(bound) for bound in train[name][1].aminmax())
        sets.append(
            ImageSet(name, pixels, labels - first, last - first + 1, mean, std, pad=max(1, size // 14), flip=False)
        )
    return sets


def mtl20(root: Path | None) -> dict[str, Drawings]:
    """The splits of 20 alphabets of the official archives or folders, by name.

    Raises ValueError where `root` does not hold all 50 alphabets with 20 drawings of every character.
    """
    whole = _read_archives(root, None) if root is not None and _is_official(root) else {}
    if len(whole) != ALPHABETS:
        raise ValueError(
            f"load_omniglot: data root must hold all {ALPHABETS} alphabets, in {' and '.join(ARCHIVES)} (folders or"
            f" .zip), for the protocol mtl20, got {len(whole)} in {root}"
        )
    draw = random.Random(0)
    chosen = sorted(draw.sample(sorted(whole), SUBSET))
    parts: dict[str, Drawings] = {split: {} for split in SHARES}
    for name in chosen:
        images, labels = whole[name]
        places: dict[str, list[int]] = {split: [] for split in SHARES}
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten().tolist()
            if len(members) != DRAWERS:
                raise ValueError(
                    f"load_omniglot: character{label + 1:02d} of {name} in {root} must have {DRAWERS} drawings, got"
                    f" {len(members)}"
                )
            draw.shuffle(members)
            for split, (first, last) in SHARES.items():
                places[split] += sorted(members[first:last])
        for split, index in places.items():
            parts[split][name] = images[index], labels[index]
    return parts


def _same_characters(root: Path | None, train: Drawings, wanted: Drawings) -> None:
    """Raise ValueError when one split has an alphabet or a character that the other lacks: their labels would differ.

    Both splits as `_read` returns them.
    """
    characters = [{name: labels.unique().tolist() for name, (_, labels) in split.items()} for split in (train, wanted)]
    if characters[0] != characters[1]:
        names = characters[0].keys() | characters[1].keys()
        name = min(name for name in names if characters[0].get(name) != characters[1].get(name))
        raise ValueError(
            f"load_omniglot: {root} must hold the same characters for training and testing, got others of {name}"
        )


def _is_official(root: Path) -> bool:
    """True where a folder holds one of the official archives, packed or not."""
    return any(holds_anything(root / name) or (root / f"{name}.zip").is_file() for name in ARCHIVES)


def _read(root: Path | None, split: str) -> Drawings:
    """Images uint8 [n, H, W] and labels int64 [n] of each alphabet, consecutive, in the order of names or numbers."""
    if root is not None and _is_official(root):
        return _read_archives(root, split)
    pieces = () if root is None else find_pieces(root, "omniglot_small", split)
    if not pieces:
        raise ValueError(
            "load_omniglot: data root must hold images_background and images_evaluation (folders or .zip) or"
            f" omniglot_small.{split}*.npz, got {root} (use --data-root)"
        )
    packed = open_pieces(pieces, {"y": CHARACTERS, "c": ALPHABETS}, rank=3)
    images = torch.from_numpy(np.concatenate(list(packed.parts)) * np.uint8(255))  # [N, H, W]
    return _by_alphabet(images, {kind: torch.from_numpy(values) for kind, values in packed.labels.items()})


def _read_archives(root: Path, split: str | None) -> Drawings:
    """Images and labels of each alphabet from the official archives or folders, as `_read` returns them; split None: of
    all drawers."""
    found: dict[str, dict[tuple[int, int], str]] = {}  # by alphabet, character and drawer: the file
    inks: dict[str, np.ndarray] = {}
    for name, content in _members(root):
        match = MEMBER.search(name)
        if match is None or int(match[2]) < 1 or not 1 <= int(match[3]) <= DRAWERS:
            raise ValueError(f"load_omniglot: {name} must be named ALPHABET/character01/0001_01.png and so on")
        drawings, place = found.setdefault(match[1], {}), (int(match[2]) - 1, int(match[3]))
        if place in drawings:
            raise ValueError(f"load_omniglot: {name} must be the only drawing of its drawer, got {drawings[place]} too")
        drawings[place] = name
        if split is None or (place[1] <= TRAIN_DRAWERS) == (split == "train"):
            inks[name] = _ink(name, content, inks)
    if not inks:
        raise ValueError(
            f"load_omniglot: archives in {root} must hold {ARCHIVES[0]}/ALPHABET/character01/*.png, got none"
        )
    for alphabet, drawings in found.items():
        _complete(root, alphabet, drawings)
    sets = {}
    for alphabet in sorted(found):
        kept = [(label, found[alphabet][label, drawer]) for label, drawer in sorted(found[alphabet])]
        kept = [(label, name) for label, name in kept if name in inks]
        if kept:
            images = torch.from_numpy(np.stack([inks[name] for _, name in kept]))
            sets[alphabet] = images, torch.tensor([label for label, _ in kept])
    return sets


def _ink(name: str, content: bytes, others: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 [H, W], 255 where there is ink, of the size of the others."""
    with blamed("load_omniglot", name, "be a PNG"):
        ink = 255 - np.asarray(rgb(opened(io.BytesIO(content))).convert("L"))
    shape = next(iter(others.values()), ink).shape
    if ink.shape != shape:
        raise ValueError(f"load_omniglot: {name} must be of {shape[1]}x{shape[0]} pixels, got {ink.shape[::-1]}")
    if ink.mean() > 127:
        raise ValueError(f"load_omniglot: {name} must be black ink on white paper, got more black than white")
    return ink


def _complete(root: Path, alphabet: str, drawings: dict[tuple[int, int], str]) -> None:
    """Raise ValueError when a character is left out, or lacks a drawer that another character of its alphabet has."""
    characters, drawers = {label for label, _ in drawings}, {drawer for _, drawer in drawings}
    for label in range(max(characters) + 1):
        if absent := [drawer for drawer in sorted(drawers) if (label, drawer) not in drawings]:
            raise ValueError(
                f"load_omniglot: character{label + 1:02d} of {alphabet} in {root} must have a drawing of drawer"
                f" {absent[0]}, as others have, got {len(drawers) - len(absent)} of {len(drawers)}; unpack it again"
            )


def _members(root: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every drawing in the archives and folders."""
    for name in ARCHIVES:
        if (path := root / f"{name}.zip").is_file():
            yield from _zip_members(path)
        elif holds_anything(folder := root / name):
            for path in sorted(folder.glob("*/*/*")):
                if PICTURE.search(path.as_posix()):
                    with blamed("load_omniglot", path, "be readable"):
                        content = path.read_bytes()
                    yield path.as_posix(), content
        elif (root / name).is_dir():
            raise ValueError(f"load_omniglot: {root / name} must hold {name} or have {name}.zip beside it, got nothing")


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with blamed("load_omniglot", path, "be a complete archive"), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if PICTURE.search(member) and not member.startswith("__MACOSX/"):
                yield f"{path}/{member}", archive.read(member)


def _by_alphabet(
    images: Tensor,  # uint8 [N, H, W]
    labels: dict[str, Tensor],  # "y" and "c", int64 [N]
) -> Drawings:
    """Split by the alphabet `c`; the characters of an alphabet are consecutive in `y`."""
    members = {alphabet: labels["c"] == alphabet for alphabet in labels["c"].unique().tolist()}
    return {f"alphabet{alphabet}": (images[member], labels["y"][member]) for alphabet, member in members.items()}


def _scaled(images: Tensor, size: int) -> Tensor:  # uint8 [n, H, W] -> uint8 [n, 1, size, size]
    if images.shape[1:] == (size, size):
        return images.unsqueeze(1)
    means = F.adaptive_avg_pool2d(images.unsqueeze(1).float(), size)
    return means.round().to(torch.uint8)
