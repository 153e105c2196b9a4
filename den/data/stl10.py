"""STL-10 (Coates, Lee and Ng, 2011): 5,000 + 8,000 labelled images of 96x96 pixels.

Read from the published archive, packed or unpacked, or from packed pieces `stl10.{split}*.npz`, see `den.data.pieces`.
"""

from pathlib import Path

import numpy as np

from den.data.archives import Archive, check, find, member_name, read
from den.data.checks import all_classes, whole_labels
from den.data.pieces import find_pieces, open_pieces
from den.data.store import Found, Pixels

ARCHIVE = Archive(
    "stl10_binary.tar.gz",
    "stl10_binary",
    "https://cs.stanford.edu/~acoates/stl10/",
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "91f7769df0f17e558f3565bffb0c7dfb",
)
CLASSES = 10
NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
IMAGES = {"train": 5000, "test": 8000}
SIZE = 96


def open_stl10(root: Path, split: str) -> Found:
    """Find a split, with labels `y`; ValueError when `root` has the set in neither form."""
    if pieces := find_pieces(root, "stl10", split):
        return Found(pieces, lambda: open_pieces(pieces, {"y": CLASSES}))
    archive, place = find(root, "stl10", [ARCHIVE])
    files = tuple(place / name for name in _members(split)) if place.is_dir() else (place,)
    return Found(files, lambda: _decode(archive, place, split))


def _members(split: str) -> tuple[str, str]:
    return f"{split}_X.bin", f"{split}_y.bin"


def _decode(archive: Archive, place: Path, split: str) -> Pixels:
    """Images are stored column by column, plane by plane; labels begin at 1."""
    check(archive, place)
    pixels, labels = (np.frombuffer(content, np.uint8) for content in read(archive, place, _members(split)))
    count = IMAGES[split]
    if pixels.size != count * 3 * SIZE**2 or labels.size != count:
        raise ValueError(
            f"load_set: {place} must have {count} images and labels of {split},"
            f" got {pixels.size / (3 * SIZE**2):g} and {labels.size}; unpack {archive.file} again"
        )
    where = f"{member_name(place, _members(split)[1])}, less 1,"
    y = whole_labels("load_set", where, labels.astype(np.int64) - 1, CLASSES)
    all_classes("load_set", where, y, CLASSES)
    images = pixels.reshape(count, 3, SIZE, SIZE).transpose(0, 3, 2, 1)
    return Pixels((count, SIZE, SIZE, 3), {"y": y}, [images])
