"""Batches of several tasks, and shares of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    tasks: tuple[str, ...]
    images: list[Tensor]  # task k: float32 [B_k, C_k, H_k, W_k], channels-last
    labels: list[Tensor]  # task k: int64 [B_k]; of a dense task a target for every pixel, [B_k, ...]
    share: Share | None = None  # None: the whole

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
        return len(self.images[0]) if self.joint else sum(map(len, self.images))

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
