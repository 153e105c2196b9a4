"""Batches that hold every task: running statistics of shared blocks then see in training what they see in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from den.data.batch import Batch, Share
from den.data.images import Drawn, Example, ImageSet, apportion
from den.data.reading import ReadAhead
from den.data.scenes import Scenes, SceneSet
from den.nn.tasks import Task
from den.support import ranks
from den.support.device import sent


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

    @property
    def tasks(self) -> tuple[Task, ...]:
        """A task for each kind of labels."""
        return tuple(each.task for each in self.sets)

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Draw how `count` images are augmented, as their set does."""
        return self.sets[0].draw(count, generator)

    def augmented_examples(self, drawn: Drawn) -> list[Example]:
        """An entry for each task: images augmented as drawn, the same for all, and its labels."""
        index, (_, images, _), *_ = drawn[0], *self.sets[0].augmented_examples(drawn)
        return [
            (s.name, images if self.joint else images.view_as(images), s.labels[sent(index, s.labels.device)])
            for s in self.sets
        ]


class BatchStream(Protocol):
    """Endless batches of some sets, with a position that a checkpoint holds."""

    epoch_steps: int
    sets: tuple[Any, ...]

    def next(self) -> Batch: ...

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MixedTaskBatches:
    """Endless augmented batches; every batch holds `counts[k]` images of set k.

    Each set is walked through in a shuffled order, which is drawn anew whenever it has been used up: a small set is
    cycled while a large one is passed once. `epoch_steps` batches pass every image of every set at least once.
    The whole position (orders, cursors, generator) is in `state_dict`.

    Processes that share a run all draw the same batches, and each makes its share of the images: process r of R those
    at r, r + R, ... of the batch.

    workers: processes that read scenes ahead; 0: scenes are read when they are needed.
    """

    def __init__(
        self,
        sets: Sequence[ImageSet | SceneSet | Labels],
        batch_size: int,
        shares: Sequence[float] | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.sets: tuple[Any, ...] = tuple(sets)
        self.counts = split_batch(batch_size, [1.0] * len(sets) if shares is None else shares, len(sets))
        # places in a batch of the images of each set that this process makes
        starts = [sum(self.counts[:k]) for k in range(len(sets))]
        self._own = [slice((ranks.rank() - start) % ranks.count(), None, ranks.count()) for start in starts]
        self.epoch_steps = max(-(-len(s) // n) for s, n in zip(self.sets, self.counts, strict=True))
        self.generator = torch.Generator().manual_seed(seed)
        self._orders = [torch.empty(0, dtype=torch.int64) for _ in self.sets]
        self._cursors = [0] * len(self.sets)
        self._ahead: ReadAhead[list[Drawn], dict[int, Scenes]] | None = None
        self._read_until: dict[str, Any] | None = None  # the position of the last batch, where later ones are read
        scenes = [each for each in self.sets if isinstance(each, SceneSet)]
        if workers and scenes:
            pinned = scenes[0].device.type == "cuda"
            self._ahead = ReadAhead(self._read_scenes, lambda: (self._draw_batch(), self._position()), workers, pinned)

    def next(self) -> Batch:
        """Draw the next batch, augmented; of a run of several processes the share of this one."""
        scenes: dict[int, Scenes] = {}
        if self._ahead is None:
            drawn = self._draw_batch()
        else:
            drawn, self._read_until, scenes = self._ahead.next()
        examples: list[Example] = []
        for k, image_set in enumerate(self.sets):
            if isinstance(image_set, SceneSet):
                examples += image_set.examples_of(scenes.get(k) or image_set.augmented_scenes(drawn[k]))
            else:
                examples += image_set.augmented_examples(drawn[k])
        tasks, images, labels = zip(*examples, strict=True)
        return Batch(tasks, list(images), list(labels), self._share(labels) if ranks.count() > 1 else None)

    def close(self) -> None:
        """End the processes that read ahead; the next batch is the one that it would have been."""
        self.load_state_dict(self.state_dict())

    def _share(self, labels: tuple[Tensor, ...]) -> Share:  # of any shapes
        """Share that a batch of these labels, made by this process, is of the whole."""
        counts, rows = [], []
        for k, image_set in enumerate(self.sets):
            counts += [self.counts[k]] * len(image_set.tasks)
            rows += [torch.arange(self.counts[k])[self._own[k]]] * len(image_set.tasks)
        return Share(tuple(counts), tuple(rows), ranks.count(), labels)

    def _draw_batch(self) -> list[Drawn]:
        """Draw the next batch: of each set the images that this process makes, and how they are augmented."""
        drawn: list[Drawn] = []
        for k, image_set in enumerate(self.sets):
            whole = self._draw(k)
            drawn.append(tuple(each[self._own[k]] for each in (whole, *image_set.draw(len(whole), self.generator))))
        return drawn

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

    def _read_scenes(self, drawn: list[Drawn]) -> dict[int, Scenes]:
        """Read the scenes of a batch, by set."""
        sets = enumerate(self.sets)
        return {k: each.augmented_scenes(drawn[k]) for k, each in sets if isinstance(each, SceneSet)}

    def _position(self) -> dict[str, Any]:
        orders = {f"order.{k}": order for k, order in enumerate(self._orders)}
        return {**orders, "generator": self.generator.get_state(), "cursors": list(self._cursors)}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` of the same sets continues from."""
        return self._position() if self._read_until is None else dict(self._read_until)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of `state_dict`; ValueError for a state of sets of other sizes."""
        orders = [state[f"order.{k}"] for k in range(len(self.sets))]
        for image_set, order in zip(self.sets, orders, strict=True):
            if len(order) not in (0, len(image_set)):
                name, size = image_set.name, len(image_set)
                raise ValueError(f"MixedTaskBatches: state of {name!r} must be of {size} images, got {len(order)}")
        if self._ahead is not None:
            self._ahead.close()
            self._read_until = None
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
