"""The image sets by name.

`digits` and `fashion` come with the install; the others are read from a folder (`--data-root`).

| name | images | layout |
|---|---|---|
| digits | 1,437 + 360, 8x8 grey | scikit-learn's digits, fixed stratified split |
| fashion | 12,000 + 2,000, 28x28 grey | balanced part of Fashion-MNIST, `packed/fashion.npz` |
| cifar100, cifar100-coarse | 50,000 + 10,000, 32x32 | `cifar100-{split}*.npz`, see `read_tiles` |
"""

from __future__ import annotations

import hashlib
import io
import itertools
import lzma
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from den.data.images import ImageSet, pixel_moments, stratified_split

FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPLITS = ("train", "test")


def load_set(name: str, split: str, root: Path | str | None = None) -> ImageSet:
    """The set `name`; `split` is "train" or "test"; `root`: folder of the sets that do not come with the install.

    Normalisation constants are those of the training split, for both splits.  Raises ValueError for an unknown name
    or split, a missing root, and files that are missing, damaged or of another layout.
    """
    if name not in _LOADERS:
        raise ValueError(f"load_set: name must be one of {', '.join(_LOADERS)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"load_set: split must be 'train' or 'test', got {split!r}")
    return _LOADERS[name](split, None if root is None else Path(root))


def set_names() -> tuple[str, ...]:
    """Names that `load_set` knows."""
    return tuple(_LOADERS)


def _digits(split: str, root: Path | None) -> ImageSet:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)  # float64 [1797, 64], values 0..16
    images = torch.from_numpy((pixels * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes).long()
    train, test = stratified_split(labels, held_out=0.2, seed=0)
    mean, std = pixel_moments(images[train])
    index = train if split == "train" else test
    return ImageSet("digits", images[index], labels[index], 10, mean, std, pad=1, flip=False,
                    class_names=tuple("0123456789"))  # fmt: skip


def _fashion(split: str, root: Path | None) -> ImageSet:
    source = resources.files("den.data").joinpath("packed", "fashion.npz")
    with source.open("rb") as file, np.load(file, allow_pickle=False) as packed:
        stream, labels, expected = (packed[f"{split}_{key}"] for key in ("images", "labels", "sha256"))
    pixels = lzma.decompress(stream.tobytes())
    if hashlib.sha256(pixels).digest() != expected.tobytes():
        raise ValueError(f"load_set: pixels of fashion {split} must match their sha256; reinstall the package")
    images = torch.from_numpy(np.frombuffer(pixels, np.uint8).copy()).view(-1, 1, 28, 28)
    mean, std = (0.2870,), (0.3536,)  # of the training images of fashion.npz
    return ImageSet("fashion", images, torch.from_numpy(labels).long(), 10, mean, std, pad=2, flip=True,
                    class_names=FASHION_CLASSES)  # fmt: skip


def _cifar100(split: str, root: Path | None) -> ImageSet:
    return _cifar100_labelled("cifar100", "fine", 100, split, root)


def _cifar100_coarse(split: str, root: Path | None) -> ImageSet:
    return _cifar100_labelled("cifar100-coarse", "coarse", 20, split, root)


def _cifar100_labelled(name: str, kind: str, classes: int, split: str, root: Path | None) -> ImageSet:
    images, labels = read_tiles(root, "cifar100", split)
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return ImageSet(name, images, labels[kind], classes, mean, std)


def read_tiles(root: Path | None, name: str, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Images uint8 [N, C, H, W] and label arrays int64 [N] of every piece `{name}-{split}*.npz` of `root`, in order.

    A piece holds `shape` ([n, H, W, 3]), `tile` (images per picture), `blob` (uint8, lossless pictures one after the
    other, each a column of images), `offsets` (where picture i begins, and the end) and one array per kind of label.
    """
    pieces = [] if root is None else sorted(root.glob(f"{name}-{split}*.npz"))
    if not pieces:
        raise ValueError(f"load_set: data root of {name!r} must hold {name}-{split}*.npz, got {root} (use --data-root)")
    images, labels = [], {}
    for piece in pieces:
        try:
            pixels, kinds = _read_piece(piece)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"load_set: {piece} must be a complete piece of {name}, got {error}") from error
        images.append(torch.from_numpy(pixels))
        for kind, values in kinds.items():
            labels.setdefault(kind, []).append(torch.from_numpy(values.astype(np.int64)))
    whole = torch.cat(images).permute(0, 3, 1, 2).contiguous()
    return whole, {kind: torch.cat(values) for kind, values in labels.items()}


def _read_piece(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    from PIL import Image

    with np.load(path, allow_pickle=False) as piece:
        shape, offsets, blob = tuple(piece["shape"]), piece["offsets"], piece["blob"]
        kinds = {key: piece[key] for key in piece.files if key not in ("shape", "offsets", "blob", "tile")}
    spans = itertools.pairwise(offsets)
    pictures = [np.asarray(Image.open(io.BytesIO(blob[begin:end].tobytes())).convert("RGB")) for begin, end in spans]
    return np.concatenate(pictures).reshape(shape), kinds


_LOADERS: dict[str, Callable[[str, Path | None], ImageSet]] = {
    "digits": _digits,
    "fashion": _fashion,
    "cifar100": _cifar100,
    "cifar100-coarse": _cifar100_coarse,
}
