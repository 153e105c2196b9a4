"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 images of 32x32 pixels.

Read from the published archives, packed or unpacked, of the python or the binary version; CIFAR-100 also from packed
pieces `cifar100-{split}*.npz`, see `open_tiles`.
"""

import codecs
import io
import itertools
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from den.data.archives import Archive, check, find, read
from den.data.checks import all_classes, blamed, whole_labels
from den.data.decode import opened, rgb
from den.data.pieces import joined
from den.data.store import Found, Pixels

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _archive(file: str, folder: str, md5: str) -> Archive:
    return Archive(file, folder, PAGE, f"https://www.cs.toronto.edu/~kriz/{file}", md5)


@dataclass(frozen=True)
class Version:
    """One of the two forms that a set is published in."""

    archive: Archive
    members: dict[str, tuple[str, ...]]  # by split
    images: int  # of a training member
    labels: dict[str, str]  # kinds of label; in the python version with their keys, in the binary one in their order


VERSIONS = {
    "cifar10": (
        Version(
            _archive("cifar-10-python.tar.gz", "cifar-10-batches-py", "c58f30108f718f92721af3b95e74349a"),
            {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
            10_000,
            {"y": "labels"},
        ),
        Version(
            _archive("cifar-10-binary.tar.gz", "cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530"),
            {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)},
            10_000,
            {"y": ""},
        ),
    ),
    "cifar100": (
        Version(
            _archive("cifar-100-python.tar.gz", "cifar-100-python", "eb9058c3a382ffc7106e4002c42a8d85"),
            {"train": ("train",), "test": ("test",)},
            50_000,
            {"fine": "fine_labels", "coarse": "coarse_labels"},
        ),
        Version(
            _archive("cifar-100-binary.tar.gz", "cifar-100-binary", "03b5dce01913d631647c71ecec9e9cb8"),
            {"train": ("train.bin",), "test": ("test.bin",)},
            50_000,
            {"coarse": "", "fine": ""},
        ),
    ),
}
CLASSES = {"y": 10, "fine": 100, "coarse": 20}  # by kind of label
TEST_IMAGES = 10_000
PIECE = re.compile(r"cifar100-(train|test)(-\d+)?\.npz")  # and not a browser's second copy of one
_RECONSTRUCT = np.empty(0).__reduce__()[0]
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): codecs.encode,
}


def open_cifar(name: str, root: Path, split: str) -> Found:
    """cifar10 with labels `y`, or cifar100 with `fine` and `coarse`; ValueError when `root` has neither version."""
    pieces = tuple(path for path in sorted(root.glob(f"{name}-{split}*.npz")) if PIECE.fullmatch(path.name))
    if pieces:
        return Found(pieces, lambda: open_tiles(pieces))
    archive, place = find(root, name, [version.archive for version in VERSIONS[name]])
    version = next(version for version in VERSIONS[name] if version.archive == archive)
    files = tuple(place / member for member in version.members[split]) if place.is_dir() else (place,)
    return Found(files, lambda: _decode(version, place, split))


def _decode(version: Version, place: Path, split: str) -> Pixels:
    check(version.archive, place)
    names = version.members[split]
    parse = _parse_pickle if next(iter(version.labels.values())) else _parse_binary
    expected = version.images if split == "train" else TEST_IMAGES
    images: list[np.ndarray] = []
    labels: dict[str, list[np.ndarray]] = {kind: [] for kind in version.labels}
    for name, content in zip(names, read(version.archive, place, names), strict=True):
        where = f"{name} of {place}"
        with blamed("load_set", where, "be a file of CIFAR"):
            pixels, kinds = parse(content, version.labels)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (expected, PIXELS):
            got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise ValueError(
                f"load_set: {where} must have {expected} images, uint8 [{expected}, {PIXELS}] of red, green and blue"
                f" planes, got {got}"
            )
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        for kind, values in kinds.items():
            labels[kind].append(whole_labels("load_set", where, values, CLASSES[kind]))
            if len(labels[kind][-1]) != expected:
                raise ValueError(
                    f"load_set: {where} must have {expected} labels, got {len(labels[kind][-1])} of {kind}"
                )
    joint = {kind: np.concatenate(values) for kind, values in labels.items()}
    for kind, values in joint.items():
        all_classes("load_set", f"{kind} labels of {split} in {place}", values, CLASSES[kind])
    return Pixels((len(names) * expected, 32, 32, 3), joint, images)


def _parse_binary(content: bytes, labels: dict[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels uint8 [n, 3 * 32 * 32] and labels uint8 [n] by kind.

    A record is a byte for each kind of label, then the red, green and blue planes.
    """
    records = np.frombuffer(content, np.uint8).reshape(-1, len(labels) + PIXELS)
    return records[:, len(labels) :], {kind: records[:, k] for k, kind in enumerate(labels)}


def _parse_pickle(content: bytes, labels: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """Pixels and labels as the pickle holds them, of any type: see `_decode` for the checks."""
    batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    return batch["data"], {kind: batch[key] for kind, key in labels.items()}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and plain values, and refuses everything else: a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """The allowed class or function of a name; UnpicklingError for any other."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"an object of {module}.{name}")
        return ALLOWED[module, name]


def open_tiles(paths: tuple[Path, ...]) -> Pixels:
    """Packed pieces of lossless pictures, one after the other.

    A piece holds `shape` ([n, H, W, 3]), `tile` (images per picture), `blob` (uint8, lossless pictures one after the
    other, each a column of images), `offsets` (where picture i begins, and the end) and one array per kind of label.

    Raises ValueError for a piece that is not complete, and for labels that are not CIFAR-100's.
    """
    images, labels = [], []
    for path in paths:
        with blamed("load_set", path, "be a complete piece"):
            pixels, kinds = _read_tiles(path)
        images.append(pixels)
        labels.append(kinds)
    classes = {kind: CLASSES[kind] for kind in ("fine", "coarse")}
    shape, joint = joined("load_set", paths, [pixels.shape for pixels in images], labels, classes)
    return Pixels(shape, joint, images)


def _read_tiles(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels uint8 [n, H, W, 3] of a piece and its labels [n] by kind, not checked."""
    with np.load(path, allow_pickle=False) as piece:
        shape, offsets, blob = tuple(piece["shape"].tolist()), piece["offsets"], piece["blob"]
        kinds = {key: piece[key] for key in piece.files if key not in ("shape", "offsets", "blob", "tile")}
    spans = itertools.pairwise(offsets)
    columns = [np.asarray(rgb(opened(io.BytesIO(blob[begin:end].tobytes())))) for begin, end in spans]
    return np.concatenate(columns).reshape(shape), kinds
