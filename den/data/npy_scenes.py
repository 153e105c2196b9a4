"""Scenes as folders of .npy files, the layout in which multi-task papers hand on NYU-v2 and Cityscapes.

    ROOT/{train,val}/image/0.npy   float [H, W, 3] in 0..1
    ROOT/{train,val}/label/0.npy   [H, W], -1 where a pixel has no class
    ROOT/{train,val}/depth/0.npy   float [H, W, 1] or [H, W], 0 where it is unknown
    ROOT/{train,val}/normal/0.npy  float [H, W, 3], the zero vector where it is unknown

and 1.npy and so on (Liu, Johns and Davison, MTAN, CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from den.data.scenes import Scene, SceneSet, checked_target
from den.tasks import IGNORE, Task

SPLITS = {"train": "train", "test": "val"}
FOLDERS = {"segmentation": "label", "depth": "depth", "normals": "normal"}
VALUES = {"depth": 1, "normals": 3}


def load_npy_scenes(
    name: str, root: Path | str | None, split: str, kinds: Sequence[str], classes: int, *, inverse_depth: bool = False
) -> SceneSet:
    """The set of `root`, a task per kind, named after it; `split` is "train" or "test" (folder val).

    Labels are read from `label_{classes}` where that folder exists, else from `label`.

    Raises ValueError for an unknown split, a root without the layout, and folders of different files; when a scene is
    read, for a file that is damaged, of another size, or with labels outside 0..classes - 1.
    """
    if split not in SPLITS:
        raise ValueError(f"load_{name}: split must be 'train' or 'test', got {split!r}")
    reader = NpyScenes(name, root, SPLITS[split], kinds, classes)
    _, height, width = reader.image(0).shape
    tasks = tuple(Task(kind, VALUES.get(kind, classes), height, 3, kind, width) for kind in kinds)
    return SceneSet(name, tasks, reader, torch.arange(len(reader.names)), inverse_depth)


class NpyScenes:
    """Reads the scenes of one split."""

    def __init__(self, name: str, root: Path | str | None, folder: str, kinds: Sequence[str], classes: int) -> None:
        self.set_name = name
        place = None if root is None else Path(root) / folder
        folders = {kind: FOLDERS[kind] for kind in kinds}
        if place is not None and (place / f"label_{classes}").is_dir():
            folders["segmentation"] = f"label_{classes}"
        wanted = ["image", *folders.values()]
        if place is None or not all((place / each).is_dir() for each in wanted):
            layout = f"{folder}/{{{','.join(wanted)}}}/*.npy"
            raise ValueError(f"load_{name}: data root must hold {layout}, got {root} (use --data.root)")
        self.folders = {kind: place / each for kind, each in folders.items()}
        self.images = place / "image"
        self.names = sorted((path.name for path in self.images.glob("*.npy")), key=lambda each: (len(each), each))
        if not self.names:
            raise ValueError(f"load_{name}: {self.images} must hold at least one image, got an empty data set")
        for each in self.folders.values():
            if missing := set(self.names) - {path.name for path in each.glob("*.npy")}:
                raise ValueError(f"load_{name}: {each} must hold a file for every image, got none for {min(missing)}")

    def __call__(self, position: int, tasks: Sequence[Task]) -> Scene:
        image, targets = self.image(position), {}
        for task in tasks:
            path = self.folders[task.kind] / self.names[position]
            targets[task.name] = checked_target(task, _target(task.kind, self._load(path)), image, str(path))
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
        scale = 255 if pixels.dtype == np.uint8 else 1
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)) / scale

    def _load(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"load_{self.set_name}: {path} must be a complete .npy file, got {error}") from error


def _target(kind: str, values: np.ndarray) -> Tensor:
    """What a file holds, in the form of its kind."""
    if kind == "segmentation":
        labels = torch.from_numpy(values.astype(np.int64))
        return labels.masked_fill(labels == -1, IGNORE)
    stacked = values[..., None] if values.ndim == 2 else values
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(stacked, -1, 0), np.float32))
