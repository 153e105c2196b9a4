"""Batches that hold every task: running statistics of shared blocks then see in training what they see in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from den.data.images import Drawn, Example, ImageSet, Labels, apportion
from den.data.reading import ReadAhead
from den.data.scenes import Scenes, SceneSet
from den.nn.task_batch import TaskBatch
from den.support import ranks
from den.support.randomness import Draws, SharedDraws


@dataclass(frozen=True)
class Share:
    """Part of a whole batch that a `Batch` holds, where processes share it or it is computed in pieces.

    Attributes:
        counts: instances of each task in the whole batch.
        rows: int64 [B_k] on the CPU: which of them are here.
        parts: processes times pieces: how many such shares make up the whole.
        labels: of each task, those of all pieces of this process.
    """

    counts: tuple[int, ...]
    rows: tuple[Tensor, ...]
    parts: int
    labels: tuple[Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """Images of every task, one entry per task; those of one `SceneSet` share a tensor of images.

    Of a task there may be no image where the batch is a share of a whole one.

    Attributes:
        joint: True where all tasks label the same images.
        count: number of images: each has one structure, however many labels.
    """

    tasks: tuple[str, ...]
    images: list[Tensor]  # task k: float32 [B_k, C_k, H_k, W_k], channels-last
    labels: list[Tensor]  # task k: int64 [B_k]; of a dense task a target for every pixel, [B_k, ...]
    share: Share | None = None  # None: the whole
    joint: bool = field(init=False)
    count: int = field(init=False)

    def __post_init__(self) -> None:
        joint = len(self.images) > 1 and all(images is self.images[0] for images in self.images)
        object.__setattr__(self, "joint", joint)
        object.__setattr__(self, "count", len(self.images[0]) if joint else sum(map(len, self.images)))

    def __len__(self) -> int:
        return sum(map(len, self.labels))

    @property
    def parts(self) -> list[tuple[str, Tensor, Tensor]]:
        """Task, images and labels of each part; of joint tasks one, with the labels of the first task."""
        whole = list(zip(self.tasks, self.images, self.labels, strict=True))
        return whole[:1] if self.joint else whole

    def for_network(self, positions: Mapping[str, int]) -> TaskBatch:
        """The images for a network that has its tasks at these positions, not checked: see `task_batch` for that."""
        if self.joint:
            return TaskBatch((positions[self.tasks[0]],), (self.images[0],), None, "joint")
        return TaskBatch(tuple([positions[task] for task in self.tasks]), tuple(self.images), None, "list")

    def only(self, k: int) -> Batch:
        """The batch of task k alone."""
        share = self.share and Share(
            (self.share.counts[k],), (self.share.rows[k],), self.share.parts, (self.share.labels[k],)
        )
        return Batch((self.tasks[k],), [self.images[k]], [self.labels[k]], share)

    def whole(self, k: int) -> int:
        """Instances of task k in the whole batch."""
        return len(self.labels[k]) if self.share is None else self.share.counts[k]

    def mean(self, values: Tensor, *tasks: int) -> Tensor:
        """The mean of values [B, ...] or [B * n, ...] of the instances, or of those of some tasks: [].

        Of a share it is the sum over what is here, divided by what a share of equal size would hold: the mean of that
        over all shares is the mean over the whole batch, and so is that of gradients.
        """
        if self.share is None:
            return values.mean()
        chosen = tasks or range(len(self.tasks))
        here, whole = (sum(numbers[k] for k in chosen) for numbers in ([*map(len, self.labels)], self.share.counts))
        return values.mean() * (here * self.share.parts / whole) if here else values.sum()

    def known(self, k: int, is_known: Callable[[Tensor], Tensor]) -> Tensor:
        """Number of targets of task k that `is_known` is true of: [], in the mean over the shares of the whole batch.

        is_known: of targets, a boolean for each.  Where processes share the batch, all of them must call this.
        """
        if self.share is None:
            return is_known(self.labels[k]).sum()
        return ranks.total(is_known(self.share.labels[k]).sum()) / self.share.parts

    def draws(self, generator: torch.Generator) -> Draws:
        """Source of random numbers for the instances."""
        if self.share is None:
            return generator
        number = len(self.parts)
        offsets = torch.tensor((0, *self.share.counts[:number])).cumsum(0).tolist()
        rows = torch.cat([rows + offset for rows, offset in zip(self.share.rows[:number], offsets[:-1], strict=True)])
        return SharedDraws(generator, offsets[-1], rows)

    def pieces(self, number: int) -> list[Batch]:
        """The batch in so many pieces, of as many images as possible alike; each holds one at least."""
        if number == 1:
            return [self]
        own = tuple(torch.arange(len(labels)) for labels in self.labels)
        share = self.share or Share(tuple(map(len, own)), own, 1, tuple(self.labels))
        return [self._piece(share, piece, number) for piece in range(number)]

    def _piece(self, share: Share, piece: int, number: int) -> Batch:
        offset, cuts = 0, {}  # tasks of the same images share them in a piece, too
        for images in self.images:
            if id(images) not in cuts:
                cut = slice((piece - offset) % number, None, number)
                cuts[id(images)] = cut, images[cut]
                offset += len(images)
        parts = [cuts[id(images)] for images in self.images]
        labels = [each[cut] for each, (cut, _) in zip(self.labels, parts, strict=True)]
        rows = tuple(each[cut] for each, (cut, _) in zip(share.rows, parts, strict=True))
        own = Share(share.counts, rows, share.parts * number, share.labels)
        return Batch(self.tasks, [images for _, images in parts], labels, own)


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
        self._processes = ranks.count()
        self._own = [slice((ranks.rank() - start) % self._processes, None, self._processes) for start in starts]
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
        return Batch(tasks, list(images), list(labels), self._share(labels) if self._processes > 1 else None)

    def close(self) -> None:
        """End the processes that read ahead; the next batch is the one that it would have been."""
        self.load_state_dict(self.state_dict())

    def _share(self, labels: tuple[Tensor, ...]) -> Share:  # of any shapes
        """Share that a batch of these labels, made by this process, is of the whole."""
        counts, rows = [], []
        for k, image_set in enumerate(self.sets):
            counts += [self.counts[k]] * len(image_set.tasks)
            rows += [torch.arange(self.counts[k])[self._own[k]]] * len(image_set.tasks)
        return Share(tuple(counts), tuple(rows), self._processes, labels)

    def _draw_batch(self) -> list[Drawn]:
        """Draw the next batch: of each set the images that this process makes, and how they are augmented."""
        drawn: list[Drawn] = []
        for k, (image_set, count) in enumerate(zip(self.sets, self.counts, strict=True)):
            parts, wanted = [], count
            while wanted:
                if self._cursors[k] == len(self._orders[k]):
                    self._orders[k] = torch.randperm(len(image_set), generator=self.generator)
                    self._cursors[k] = 0
                part = self._orders[k][self._cursors[k] : self._cursors[k] + wanted]
                self._cursors[k] += len(part)
                wanted -= len(part)
                parts.append(part)
            augmented = image_set.draw(count, self.generator)
            drawn.append(tuple([each[self._own[k]] for each in (torch.cat(parts), *augmented)]))
        return drawn

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
