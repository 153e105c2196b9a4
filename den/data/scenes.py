"""Images that carry targets of several dense tasks, read from disk when they are needed.

A target has one place per pixel: labels int64 [H, W], 255 where a pixel has none; depth, edges and saliency float32
[1, H, W] and normals float32 [3, H, W], with 0, 255, 255 and the zero vector where there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from den.data.images import Drawn, Example
from den.nn.tasks import IGNORE, Task
from den.support.device import CPU, sent

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images
NOTHING = {"segmentation": IGNORE, "depth": 0, "normals": 0, "edges": IGNORE, "saliency": IGNORE}  # no target, by kind
ZOOMS = (1.0, 1.2, 1.5)
Scenes = tuple[Tensor, dict[str, Tensor]]  # on the host: normalised images [n, 3, H, W], targets [n, ...] by task


@dataclass(frozen=True)
class Scene:
    """An image and its targets."""

    image: Tensor  # float32 [3, H, W], 0..1
    targets: dict[str, Tensor]  # by the name of the task


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Scenes at `index` of a reader, and the tasks that they are used for.

    Attributes:
        read: of a position and the tasks wanted: the scene there; all scenes have the same size.
        index: int64 [N].
        inverse_depth: True where "depth" is its inverse (disparity), which grows as an image is zoomed into.
        device: where batches lie.
    """

    name: str
    tasks: tuple[Task, ...]
    read: Callable[[int, Sequence[Task]], Scene]
    index: Tensor
    inverse_depth: bool = False
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> SceneSet:
        """Copy the set for a device: batches lie there; scenes are read and augmented on the host."""
        return dataclasses.replace(self, device=device)

    def only(self, names: Sequence[str]) -> SceneSet:
        """Keep only the tasks of these names, on the same scenes."""
        return dataclasses.replace(self, tasks=tuple(task for task in self.tasks if task.name in names))

    def split(self, share: float, seed: int) -> tuple[SceneSet, SceneSet]:
        """Split at random into (kept, held out); the second part has `ceil(share * N)` scenes."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = math.ceil(share * len(self))
        parts = (order[held:].sort().values, order[:held].sort().values)
        kept, held_out = (dataclasses.replace(self, index=self.index[part]) for part in parts)
        return kept, held_out

    def check_targets(self) -> None:
        """Raise ValueError for a task without a target in any pixel of any scene.

        Scenes are read until every task has had a target, which usually takes one or a few.
        """
        missing = list(self.tasks)
        for position in self.index.tolist():
            targets = self.read(position, missing).targets
            missing = [task for task in missing if not (targets[task.name] != NOTHING.get(task.kind, math.nan)).any()]
            if not missing:
                return
        names = ", ".join(task.name for task in missing)
        raise ValueError(f"SceneSet: {names} of {self.name} must have a target, got none in {len(self)} images")

    def examples(self, index: Tensor | slice) -> list[Example]:
        """Name, normalised images float32 [n, 3, H, W] and targets [n, ...] of every task; all share the images."""
        return self.examples_of(self._stacked([self.read(i, self.tasks) for i in self.index[index].tolist()]))

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Draw how `count` scenes are augmented: int64 [n], which of `ZOOMS`; [n, 3], place, and below 1/2 mirrored."""
        zooms = torch.randint(len(ZOOMS), (count,), generator=generator)
        return zooms, torch.rand(count, 3, generator=generator)

    def augmented_scenes(self, drawn: Drawn) -> Scenes:
        """Read scenes and augment them as drawn: zoomed into by 1, 1.2 or 1.5, and half of them mirrored."""
        index, zooms, places = (each.tolist() for each in drawn)
        scenes = []
        for position, zoom, (top, left, coin) in zip(self.index[index].tolist(), zooms, places, strict=True):
            scene = self.read(position, self.tasks)
            scenes.append(augmented(scene, self.tasks, ZOOMS[zoom], (top, left), coin < 0.5, self.inverse_depth))
        return self._stacked(scenes)

    def examples_of(self, scenes: Scenes) -> list[Example]:
        """Entries as of `examples`, on the set's device, of scenes that were read."""
        images = sent(scenes[0], self.device)
        return [(task.name, images, sent(scenes[1][task.name], self.device)) for task in self.tasks]

    def _stacked(self, scenes: list[Scene]) -> Scenes:
        if not scenes:
            return self._none()
        images = normalised(torch.stack([scene.image for scene in scenes]))
        return images, {task.name: torch.stack([scene.targets[task.name] for scene in scenes]) for task in self.tasks}

    def _none(self) -> Scenes:
        """No scenes, of the shapes that they would have."""
        targets = {
            task.name: torch.zeros(0, *task.shape[1:], dtype=torch.int64)
            if task.kind == "segmentation"
            else torch.zeros(0, task.classes, *task.shape[1:])
            for task in self.tasks
        }
        return torch.zeros(0, *self.tasks[0].shape), targets


def augmented(
    scene: Scene, tasks: Sequence[Task], zoom: float, place: tuple[float, float], mirror: bool, inverse_depth: bool
) -> Scene:
    """A part of the scene, 1 / zoom as high and wide, at its size; images are interpolated, targets are not.

    place: 0..1, 0..1: where the part lies, from the top and the left. Zooming in divides depths by the zoom, as if the
    camera were nearer, and multiplies inverse ones; mirroring turns the first component of normals.
    """
    height, width = scene.image.shape[1:]
    part = int(height / zoom), int(width / zoom)
    top, left = (int(p * (whole - own + 1)) for p, whole, own in zip(place, (height, width), part, strict=True))
    rows, columns = top + nearest(part[0], height), left + nearest(part[1], width)
    if mirror:
        columns = columns.flip(0)
    image = scene.image[:, top : top + part[0], left : left + part[1]]
    if part != (height, width):
        image = F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    targets = {task.name: scene.targets[task.name][..., rows[:, None], columns] for task in tasks}
    for task in tasks:
        if task.kind == "depth":
            targets[task.name] = targets[task.name] * (zoom if inverse_depth else 1 / zoom)
        elif task.kind == "normals" and mirror:
            targets[task.name] = targets[task.name] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return Scene(image.flip(2) if mirror else image, targets)


def nearest(size: int, out_size: int) -> Tensor:
    """The pixels of `size` in which the middles of `out_size` pixels of the same extent lie: int64 [out_size].

    >>> nearest(2, 4).tolist(), nearest(6, 3).tolist()
    ([0, 0, 1, 1], [1, 3, 5])
    """
    return (2 * torch.arange(out_size) + 1) * size // (2 * out_size)


def normalised(images: Tensor) -> Tensor:
    """Images float32 [N, 3, H, W] in 0..1, less ImageNet's means and divided by its deviations; channels-last."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def checked_target(task: Task, target: Tensor, image: Tensor, where: str) -> Tensor:
    """Return `target` in the dtype of its kind: int64 [H, W] of segmentation, else float32 [classes, H, W].

    Raises ValueError when it is not of the size of `image` ([3, H, W]) or holds a value that its kind does not have.
    """
    size = tuple(image.shape[1:])
    wanted = size if task.kind == "segmentation" else (task.classes, *size)
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"SceneSet: {task.name} must be {list(wanted)}, as its image is {list(size)}, got {list(target.shape)}"
            f" in {where}"
        )
    if task.kind == "segmentation":
        known = target[target != IGNORE]
        if known.numel() and (known.min() < 0 or known.max() >= task.classes):
            raise ValueError(
                f"SceneSet: labels of {task.name} must lie in 0..{task.classes - 1},"
                f" got {int(known.min())}..{int(known.max())} in {where}"
            )
        return target.long()
    if not target.isfinite().all():
        raise ValueError(f"SceneSet: {task.name} must be finite, got {target[~target.isfinite()][0]} in {where}")
    if task.kind in ("edges", "saliency") and not torch.isin(target, torch.tensor([0, 1, IGNORE])).all():
        raise ValueError(f"SceneSet: {task.name} must be 0, 1 or {IGNORE}, got other values in {where}")
    return target.float()
