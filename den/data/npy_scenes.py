"""Scenes as folders of .npy files, the layout in which multi-task papers hand on NYU-v2 and Cityscapes.

    ROOT/{train,val}/image/0.npy   float [H, W, 3] in 0..1
    ROOT/{train,val}/label/0.npy   [H, W], -1 (as a byte 255) where a pixel has no class
    ROOT/{train,val}/depth/0.npy   float [H, W, 1] or [H, W], 0 where it is unknown
    ROOT/{train,val}/normal/0.npy  float [H, W, 3] of length 1, the zero vector where it is unknown

and 1.npy and so on (Liu, Johns and Davison, MTAN, CVPR 2019). Images may also be uint8 in 0..255.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from den.data.checks import blamed
from den.data.scenes import Scene, SceneSet, checked_target
from den.nn.tasks import IGNORE, Task

SPLITS = {"train": "train", "test": "val"}
FOLDERS = {"segmentation": "label", "depth": "depth", "normals": "normal"}
VALUES = {"depth": 1, "normals": 3}
SLACK = 0.01  # beyond 0..1 or -1..1, of values that were interpolated


def load_npy_scenes(
    name: str,
    root: Path | str | None,
    split: str,
    kinds: Sequence[str],
    classes: int | None,
    *,
    known_classes: Sequence[int],
    farthest: float,
    inverse_depth: bool = False,
) -> SceneSet:
    """The set of `root`, a task per kind, named after it; `split` is "train" or "test" (folder val).

    Labels are read from `label_{classes}` where that folder holds any, else from `label`.

    Args:
        classes: of the labels; None: what the files say, see :func:`classes_of_labels`.
        known_classes: how many classes the set is handed on with, the usual number first.
        farthest: no depth of the set is greater, in its unit.

    Warns where labels are much lower than `classes` allows: classes that never occur are learned by nobody.

    Raises ValueError for an unknown split, a root without the layout, and folders of different files; when a scene is
    read, for a file that is damaged, of another size, or with values that the set does not have: images outside 0..1,
    labels outside 0..classes - 1, depths outside 0..farthest, normals of other lengths.
    """
    if split not in SPLITS:
        raise ValueError(f"load_{name}: split must be 'train' or 'test', got {split!r}")
    found = classes_of_labels(name, root, SPLITS[split], known_classes, classes) if "segmentation" in kinds else 0
    reader = NpyScenes(name, root, SPLITS[split], kinds, found, farthest)
    _, height, width = reader.image(0).shape
    tasks = tuple(Task(kind, VALUES.get(kind, found), height, 3, kind, width) for kind in kinds)
    return SceneSet(name, tasks, reader, torch.arange(len(reader.names)), inverse_depth)


def classes_of_labels(
    name: str, root: Path | str | None, folder: str, known_classes: Sequence[int], classes: int | None
) -> int:
    """The number of classes of the labels in `root`.

    `classes` where it is given. Else that of a folder `label_{number}`, the first of `known_classes` that has one; else
    the lowest of `known_classes` that is above the labels in `label`, of which 64 scenes are looked at, those of the
    training split where it is there. Files that do not fit are left to those who read the scenes, and name them.

    Warns where the labels end below a lower one of `known_classes`.
    """
    places = [Path(root) / each for each in ("train", folder)] if root is not None else []
    numbers = (classes,) if classes else known_classes
    named = next((n for n in numbers for place in places if _names(place / f"label_{n}")), None)
    files = next(
        (found for place in places if (found := _sample(place / (f"label_{named}" if named else "label")))), []
    )
    highest = max((_highest(path, max(known_classes)) for path in files), default=-1)
    if named is None:
        named = min((n for n in numbers if n > highest), default=max(numbers))
    fewer = [n for n in known_classes if highest < n < named]
    if fewer and highest >= 0:
        warnings.warn(
            f"load_{name}: no label is above {highest} in {len(files)} scenes, as if there were {min(fewer)} classes; "
            f"there are {named}",
            stacklevel=2,
        )
    return named


def _sample(folder: Path, most: int = 64) -> list[Path]:
    """At most so many arrays of a folder, spread over it."""
    names = sorted(_names(folder))
    count = min(most, len(names))
    return [folder / names[i * len(names) // count] for i in range(count)]


def _highest(path: Path, limit: int) -> int:
    """The highest label below `limit` in a file; -1 where there is none."""
    try:
        values = np.load(path, allow_pickle=False)
        labels = values[(values >= 0) & (values < limit)]
        return int(labels.max()) if labels.size else -1
    except (OSError, ValueError, TypeError, EOFError):  # told where the scene is read
        return -1


class NpyScenes:
    """Reads the scenes of one split."""

    def __init__(
        self, name: str, root: Path | str | None, folder: str, kinds: Sequence[str], classes: int, farthest: float
    ) -> None:
        self.set_name, self.farthest = name, farthest
        place = None if root is None else Path(root) / folder
        folders = {kind: FOLDERS[kind] for kind in kinds}
        if place is not None and _names(place / f"label_{classes}"):
            folders["segmentation"] = f"label_{classes}"
        wanted = ["image", *folders.values()]
        if place is None or not all((place / each).is_dir() for each in wanted):
            layout = f"{folder}/{{{','.join(wanted)}}}/*.npy"
            raise ValueError(f"load_{name}: data root must hold {layout}, got {root} (use --data.root)")
        self.folders = {kind: place / each for kind, each in folders.items()}
        self.images = place / "image"
        self.names = sorted(_names(self.images), key=lambda each: (len(each), each))
        if not self.names:
            raise ValueError(f"load_{name}: {self.images} must hold at least one image, got an empty data set")
        for each in self.folders.values():
            there = _names(each)
            if missing := set(self.names) - there:
                raise ValueError(f"load_{name}: {each} must hold a file for every image, got none for {min(missing)}")
            if more := there - set(self.names):
                raise ValueError(f"load_{name}: {self.images} must hold the image of every file, got no {min(more)}")

    def __call__(self, position: int, tasks: Sequence[Task]) -> Scene:
        image, targets = self.image(position), {}
        for task in tasks:
            path = self.folders[task.kind] / self.names[position]
            targets[task.name] = checked_target(task, self._target(task.kind, path), image, str(path))
            if image.shape != task.shape:
                raise ValueError(
                    f"load_{self.set_name}: images must be {list(task.shape)} as the first one,"
                    f" got {list(image.shape)} in {self.images / self.names[position]}"
                )
        return Scene(image, targets)

    def image(self, position: int) -> Tensor:
        """float32 [3, H, W] in 0..1."""
        path = self.images / self.names[position]
        pixels = self._load(path)
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"load_{self.set_name}: image must be [H, W, 3], got {list(pixels.shape)} in {path}")
        if pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32) / 255
        self._within(path, "image", pixels, "f", 0, 1, SLACK)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32))

    def _target(self, kind: str, path: Path) -> Tensor:
        """The target in a file: int64 [H, W] of segmentation, float32 [1, H, W] of depth, [3, H, W] of normals."""
        values = self._load(path)
        if kind == "segmentation":
            self._within(path, "labels", values, "iuf", -np.inf, np.inf)
            if (values % 1 != 0).any():
                raise ValueError(f"load_{self.set_name}: labels must be whole numbers, got fractions in {path}")
            labels = torch.from_numpy(values.astype(np.int64))
            return labels.masked_fill(labels == -1, IGNORE)
        bounds = (0, self.farthest, 0) if kind == "depth" else (-1, 1, SLACK)
        self._within(path, kind, values, "f", *bounds)
        if kind == "normals" and values.shape[-1:] == (3,):
            lengths = np.linalg.norm(values.astype(np.float32), axis=-1)
            typical = float(np.median(lengths[lengths > 0])) if lengths.any() else 1.0
            if not 0.9 <= typical <= 1.1:
                raise ValueError(f"load_{self.set_name}: normals must be of length 1, got {typical:.3g} in {path}")
        stacked = values[..., None] if values.ndim == 2 else values
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(stacked, -1, 0), np.float32))

    def _within(
        self, path: Path, what: str, values: np.ndarray, types: str, low: float, high: float, slack: float = 0
    ) -> None:
        """Raise ValueError for values, of any shape, that are of another type, not finite, or outside the range.

        types: letters of numpy's kinds; the range: low - slack..high + slack.
        """
        if values.dtype.kind not in types:
            wanted = "floats" if types == "f" else "numbers"
            raise ValueError(f"load_{self.set_name}: {what} must be {wanted}, got {values.dtype} in {path}")
        if not np.isfinite(values).all():
            raise ValueError(
                f"load_{self.set_name}: {what} must be finite, got {values[~np.isfinite(values)][0]} in {path}"
            )
        least, most = (float(values.min()), float(values.max())) if values.size else (low, high)
        if least < low - slack or most > high + slack:
            raise ValueError(
                f"load_{self.set_name}: {what} must lie in {low:g}..{high:g}, got {least:g}..{most:g} in {path}"
            )

    def _load(self, path: Path) -> np.ndarray:  # of any shape and type
        with blamed(f"load_{self.set_name}", path, "be a complete .npy file"):
            values = np.load(path, allow_pickle=False)
            if not isinstance(values, np.ndarray):
                raise ValueError("an archive of arrays")
            return values


def _names(folder: Path) -> set[str]:
    """Names of the arrays in a folder; none where there is no folder."""
    return {path.name for path in folder.glob("[!.]*.npy")} if folder.is_dir() else set()
