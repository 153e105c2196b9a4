"""Batches that hold every task: running statistics of shared blocks then see in training what they see in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from den.data.images import Example, ImageSet, apportion
from den.data.scenes import SceneSet
from den.support.device import sent


@dataclass(frozen=True)
class Batch:
    """Images of every task, one entry per task; those of one `SceneSet` share a tensor of images."""

    tasks: tuple[str, ...]
    images: list[Tensor]  # task k: float32 [B_k, C_k, H_k, W_k], channels-last
    labels: list[Tensor]  # task k: int64 [B_k]; of a dense task a target for every pixel, [B_k, ...]

    def __len__(self) -> int:
        return sum(map(len, self.labels))

    @property
    def joint(self) -> bool:
        """True where all tasks label the same images."""
        return len(self.images) > 1 and all(images is self.images[0] for images in self.images)

    @property
    def parts(self) -> list[tuple[str, Tensor, Tensor]]:
        """Task, images and labels of each part; of joint tasks one, with the labels of the first task."""
        whole = list(zip(self.tasks, self.images, self.labels, strict=True))
        return whole[:1] if self.joint else whole

    @property
    def count(self) -> int:
        """Number of images: each has one structure, however many labels."""
        return sum(len(images) for _, images, _ in self.parts)


class Labels:
    """Training images that several tasks label, drawn once with all their labels.

    joint: False makes the tasks' images parts of their own in a batch, for methods that treat the tasks apart.

    Raises:
        ValueError: sets that are not of the same images, or not of one size.
    """

    def __init__(self, sets: Sequence[ImageSet], joint: bool = True) -> None:
        first, *others = sets
        for other in others:
            same = other.source == first.source and torch.equal(other.places, first.places)
            if not same or other.images.shape != first.images.shape:
                raise ValueError(
                    f"data.joint: tasks must be labels of the same images, got {first.name} and {other.name}"
                    f" ({len(first)} and {len(other)} images)"
                )
        self.sets, self.name, self.joint = tuple(sets), first.name, joint

    def __len__(self) -> int:
        return len(self.sets[0])

    def augmented_examples(self, index: Tensor, generator: torch.Generator) -> list[Example]:
        """An entry for each task: the images at `index` (int64 [n]) augmented, the same for all, and its labels."""
        images = self.sets[0].augmented(index, generator)
        return [
            (s.name, images if self.joint else images.view_as(images), s.labels[sent(index, s.labels.device)])
            for s in self.sets
        ]


class BatchStream(Protocol):
    """Endless batches of some sets, with a position that a checkpoint holds."""

    epoch_steps: int
    sets: tuple[Any, ...]

    def next(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MixedTaskBatches:
    """Endless augmented batches; every batch holds `counts[k]` images of set k.

    Each set is walked through in a shuffled order, which is drawn anew whenever it has been used up: a small set is
    cycled while a large one is passed once. `epoch_steps` batches pass every image of every set at least once.
    The whole position (orders, cursors, generator) is in `state_dict`.
    """

    def __init__(
        self,
        sets: Sequence[ImageSet | SceneSet | Labels],
        batch_size: int,
        shares: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.sets: tuple[Any, ...] = tuple(sets)
        self.counts = split_batch(batch_size, [1.0] * len(sets) if shares is None else shares, len(sets))
        self.epoch_steps = max(-(-len(s) // n) for s, n in zip(self.sets, self.counts, strict=True))
        self.generator = torch.Generator().manual_seed(seed)
        self._orders = [torch.empty(0, dtype=torch.int64) for _ in self.sets]
        self._cursors = [0] * len(self.sets)

    def next(self) -> Batch:
        """Draw the next batch, augmented."""
        examples: list[Example] = []
        for k, image_set in enumerate(self.sets):
            examples += image_set.augmented_examples(self._draw(k), self.generator)
        tasks, images, labels = zip(*examples, strict=True)
        return Batch(tasks, list(images), list(labels))

    def _draw(self, k: int) -> Tensor:
        """Draw the next counts[k] positions of set k: int64 [counts[k]]."""
        parts, wanted = [], self.counts[k]
        while wanted:
            if self._cursors[k] == len(self._orders[k]):
                self._orders[k] = torch.randperm(len(self.sets[k]), generator=self.generator)
                self._cursors[k] = 0
            part = self._orders[k][self._cursors[k] : self._cursors[k] + wanted]
            self._cursors[k] += len(part)
            wanted -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` of the same sets continues from."""
        orders = {f"order.{k}": order for k, order in enumerate(self._orders)}
        return {**orders, "generator": self.generator.get_state(), "cursors": list(self._cursors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of `state_dict`; ValueError for a state of sets of other sizes."""
        orders = [state[f"order.{k}"] for k in range(len(self.sets))]
        for image_set, order in zip(self.sets, orders, strict=True):
            if len(order) not in (0, len(image_set)):
                name, size = image_set.name, len(image_set)
                raise ValueError(f"MixedTaskBatches: state of {name!r} must be of {size} images, got {len(order)}")
        self._orders, self._cursors = orders, [int(c) for c in state["cursors"]]
        self.generator.set_state(state["generator"])


def split_batch(batch_size: int, shares: Sequence[float], tasks: int) -> tuple[int, ...]:
    """Images of each task in a batch, in proportion to `shares`."""
    if len(shares) != tasks or tasks == 0 or min(shares) <= 0:
        raise ValueError(f"split_batch: shares must be {tasks} positive numbers, one per task, got {list(shares)}")
    counts = tuple(apportion(batch_size, shares)) if batch_size > 0 else (0,) * tasks
    if min(counts) == 0:
        raise ValueError(f"split_batch: batch_size must give every task an image, got {batch_size} for {list(shares)}")
    return counts
