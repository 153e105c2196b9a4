"""The sets of tasks that `den dag` trains on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from den.dag.config import DagDataConfig
from den.data.images import ImageSet
from den.data.omniglot import load_omniglot
from den.data.sets import load_set


def load_tasks(data: DagDataConfig, split: str, root: Path | None = None) -> list[ImageSet]:
    """A set per task of the scenario; `root` replaces that of the settings.

    Raises ValueError for data that are missing, damaged, or lack a task that is asked for.
    """
    root = root or data.root
    if data.scenario == "omniglot":
        sets = load_omniglot(root, split, data.size)
    else:
        sets = by_coarse_label(load_set("cifar100", split, root), load_set("cifar100-coarse", split, root).labels)
    names = [image_set.name for image_set in sets]
    if missing := [name for name in data.only if name not in names]:
        raise ValueError(f"config: data.only must be among {', '.join(names)}, got {', '.join(missing)}")
    return [image_set for image_set in sets if not data.only or image_set.name in data.only]


def by_coarse_label(fine: ImageSet, coarse: Tensor) -> list[ImageSet]:
    """A set per coarse label (int64 [N]) of `fine`, its classes the fine labels under it, numbered from 0 by rank."""
    sets = []
    for label in coarse.unique().tolist():
        member = (coarse == label).nonzero().flatten()
        kinds, numbered = fine.labels[member].unique(return_inverse=True)
        sets.append(
            dataclasses.replace(
                fine, name=f"coarse{label}", images=fine.images[member], labels=numbered, classes=len(kinds)
            )
        )
    return sets
