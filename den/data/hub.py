"""Image sets of Hugging Face's `datasets`, where it is installed: `hf:NAME@64`, or `hf:PATH@64` of one saved to disk.

`hf:user/name:configuration@64` names a configuration too. The first column of images and the first of class labels
count. The splits are "train" and "test" (or "validation"); of a set without the latter a fifth of every class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from den.data.checks import blamed
from den.data.folder import TEST_SHARE, decoded, own_set, parse, without_broken
from den.data.images import ImageSet, stratified_split
from den.data.store import Found, Pixels, stored

PREFIX = "hf:"
TEST_SPLITS = ("test", "validation", "valid", "val")


class _Column(Sequence[Any]):
    """Pictures of a data set, opened when they are asked for."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index][self._column]


def open_hub(name: str, split: str, root: Path | str | None) -> ImageSet:
    """The set `hf:NAME@SIZE`.

    Raises:
        ValueError: `datasets` is not installed, does not have the set, or finds no images or class labels in it.
    """
    path, size = parse(name, PREFIX)
    parts = _load(name, path)
    train = next((parts[key] for key in ("train", *parts) if key in parts), None)
    if train is None:
        raise ValueError(f"load_set: {name} must have a split of images, got none")
    test = next((parts[key] for key in TEST_SPLITS if key in parts and parts[key] is not train), None)
    pictures, label = _columns(name, train)
    classes = tuple(train.features[label].names)
    home = Path.cwd() if root is None else Path(root)
    train_images, train_labels = _read(name, train, pictures, label, size, home, "train")
    if test is None:
        kept = stratified_split(train_labels, TEST_SHARE, seed=0)
        index = kept[0 if split == "train" else 1]
        return own_set(name, train_images[index], train_labels[index], classes, train_images[kept[0]])
    if split == "train":
        return own_set(name, train_images, train_labels, classes, train_images)
    if test.features[label].names != list(classes):
        raise ValueError(f"load_set: classes of {name} must be the same in both splits, got others for testing")
    return own_set(name, *_read(name, test, pictures, label, size, home, "test"), classes, train_images)


def _load(name: str, path: str) -> dict[str, Any]:
    """The splits of a set, by name."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"load_set: {name} must be read by Hugging Face's datasets, which is not installed (pip install datasets)"
        ) from None
    repository, _, configuration = path.partition(":")
    with blamed("load_set", name, "be a data set that datasets can load"):
        if Path(path).is_dir():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(repository, configuration or None)
    return dict(found) if isinstance(found, dict) else {"train": found}


def _columns(name: str, rows: Any) -> tuple[str, str]:
    """Names of the columns of images and of class labels."""
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    found = [next((column for column in kinds if kinds[column] == kind), None) for kind in ("Image", "ClassLabel")]
    if found[0] is None or found[1] is None:
        got = ", ".join(f"{column} of {kind}" for column, kind in kinds.items())
        raise ValueError(f"load_set: {name} must have a column of Image and one of ClassLabel, got {got}")
    return found[0], found[1]


def _read(name: str, rows: Any, column: str, label: str, size: int, home: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, S, S] and labels int64 [N]; decoded once where the set lies in files."""
    reasons: dict[int, str] = {}
    given = list(rows[label])
    labelled = [k for k, y in enumerate(given) if y is not None and y >= 0]  # -1: a label that is not told
    rows = rows if len(labelled) == len(given) else rows.select(labelled)
    labels = [given[k] for k in labelled]
    files = tuple(Path(entry["filename"]) for entry in getattr(rows, "cache_files", ()))
    source = Found(files, lambda: decoded(_Column(rows, column), labels, size, reasons))
    if files:
        slug = "".join(c if c.isalnum() else "-" for c in name)
        images, stored_labels = stored(source, home, f"{slug}-{part}-{size}")
    else:
        images, stored_labels = _in_memory(source.decode())
    return without_broken(
        images, stored_labels, [f"picture {k} of {name} ({part})" for k in range(len(labels))], reasons
    )


def _in_memory(pixels: Pixels) -> tuple[Tensor, dict[str, Tensor]]:
    images = torch.cat([torch.from_numpy(part) for part in pixels.parts]).permute(0, 3, 1, 2)
    return images, {kind: torch.from_numpy(values) for kind, values in pixels.labels.items()}
