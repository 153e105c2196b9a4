"""Scenes as folders of .npy files, the layout in which multi-task papers hand on NYU-v2 and Cityscapes.

    ROOT/{train,val}/image/0.npy   float [H, W, 3] in 0..1
    ROOT/{train,val}/label/0.npy   [H, W], -1 (as a byte 255) where a pixel has no class
    ROOT/{train,val}/depth/0.npy   float [H, W, 1] or [H, W], 0 where it is unknown
    ROOT/{train,val}/normal/0.npy  float [H, W, 3] of length 1, the zero vector where it is unknown

and 1.npy and so on (Liu, Johns and Davison, MTAN, CVPR 2019). Images may also be uint8 in 0..255.
"""

from __future__ import annotations

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
    classes: int,
    *,
    farthest: float,
    inverse_depth: bool = False,
) -> SceneSet:
    """The set of `root`, a task per kind, named after it; `split` is "train" or "test" (folder val).

    Labels are read from `label_{classes}` where that folder holds any, else from `label`.

    farthest: no depth of the set is greater, in its unit.

    Raises ValueError for an unknown split, a root without the layout, and folders of different files; when a scene is
    read, for a file that is damaged, of another size, or with values that the set does not have: images outside 0..1,
    labels outside 0..classes - 1, depths outside 0..farthest, normals of other lengths.
    """
    if split not in SPLITS:
        raise ValueError(f"load_{name}: split must be 'train' or 'test', got {split!r}")
    reader = NpyScenes(name, root, SPLITS[split], kinds, classes, farthest)
    _, height, width = reader.image(0).shape
    tasks = tuple(Task(kind, VALUES.get(kind, classes), height, 3, kind, width) for kind in kinds)
    return SceneSet(name, tasks, reader, torch.arange(len(reader.names)), inverse_depth)


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
