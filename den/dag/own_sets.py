"""The image sets and folders that a user names as tasks, with `--data.tasks`."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np

from den.dag.config import DagDataConfig
from den.data.checks import blamed
from den.data.folder import PREFIX, found_folder, parse
from den.data.images import ImageSet
from den.data.npy_scenes import FOLDERS, load_npy_scenes
from den.data.scenes import SceneSet
from den.data.sets import load_set


def load_own_sets(data: DagDataConfig, split: str, root: Path | None) -> list[ImageSet | SceneSet]:
    """A set for each of `data.tasks`; those of folders are named after the folder.

    Raises ValueError where none is named, two tasks have the same name, and for sets that are missing or damaged.
    """
    if not data.tasks:
        raise ValueError(
            "config: data.tasks must name the tasks of the scenario own (--data.tasks digits,folder:PATH), got none;"
            " tasks of data loaders are trained by den.recipes.dag.fit"
        )
    sets = [_load(name, data, split, root) for name in data.tasks]
    counts = Counter(task.name for each in sets for task in each.tasks)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"config: data.tasks must have different names, got {twice[0]} twice; rename a folder")
    return sets


def _load(name: str, data: DagDataConfig, split: str, root: Path | None) -> ImageSet | SceneSet:
    if not name.startswith(PREFIX):
        return load_set(name, split, root)
    path = found_folder(parse(name, PREFIX)[0], root)
    if (path / "train" / "image").is_dir():
        return _scenes(path, data, split, len(data.tasks) > 1)
    sized = name if "@" in name or data.size is None else f"{name}@{data.size}"
    return dataclasses.replace(load_set(sized, split, root), name=path.name)


def _scenes(path: Path, data: DagDataConfig, split: str, several: bool) -> SceneSet:
    """The dense tasks that a folder has targets of; named after their kind, and their folder where there are others."""
    kinds = tuple(kind for kind, folder in FOLDERS.items() if (path / "train" / folder).is_dir())
    if not kinds:
        wanted = ", ".join(FOLDERS.values())
        raise ValueError(f"config: {path / 'train'} must hold one of {wanted} beside image, got none")
    classes = data.classes
    if classes is None and "segmentation" in kinds:
        files = sorted((path / "train" / FOLDERS["segmentation"]).glob("[!.]*.npy"))
        classes = 1 + max(map(_highest, files), default=0)
    known = (classes or 1,)
    found = load_npy_scenes(path.name, path, split, kinds, classes, known_classes=known, farthest=float("inf"))
    names = {task.name: f"{path.name}-{task.name}" if several else task.name for task in found.tasks}
    return dataclasses.replace(
        found,
        tasks=tuple(dataclasses.replace(task, name=names[task.name]) for task in found.tasks),
    )


def _highest(path: Path) -> int:
    """The highest label in a file, not counting the marks of pixels without a label."""
    with blamed("load_own_sets", path, "be a complete .npy file"):
        values = np.load(path, allow_pickle=False)
        known = values[(values >= 0) & (values != 255)]
        return int(known.max()) if known.size else 0
