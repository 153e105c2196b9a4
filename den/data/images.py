"""Labelled image sets in memory, which make normalised (and augmented) network inputs of their images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.tasks import Task
from den.support.device import sent

Example = tuple[str, Tensor, Tensor]  # task, images [n, C, H, W], targets [n, ...]
Drawn = tuple[Tensor, ...]  # positions of images, int64 [n], and how each is augmented, [n, ...]: see `draw`


@dataclass(frozen=True)
class Kept:
    """Facts of its images that a trained network needs to know: they stand in the checkpoint."""

    mean: tuple[float, ...]  # [C], of the training pixels divided by 255
    std: tuple[float, ...]  # [C]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one task.

    Raises:
        ValueError: no image, or a label outside 0..classes - 1.
    """

    name: str
    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    classes: int
    mean: tuple[float, ...]  # [C], of the training pixels divided by 255
    std: tuple[float, ...]  # [C]
    pad: int = 4  # augmentation: black border in pixels before the random crop
    flip: bool = True  # augmentation: mirror half of the images
    class_names: tuple[str, ...] = field(default=(), repr=False)
    source: str = ""  # of the images: sets of one source are labels, or parts, of the same images; "": of none else
    ids: Tensor | None = field(default=None, repr=False)  # int64 [N], which images of the source; None: in its order

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f"ImageSet: images must be uint8 [N, C, H, W], got {self.images.dtype} {list(shape)}")
        if shape[0] == 0:
            raise ValueError(f"ImageSet: {self.name!r} must hold at least one image, got an empty data set")
        if self.labels.shape != shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"ImageSet: labels must be int64 [{shape[0]}], got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if self.ids is not None and self.ids.shape != shape[:1]:
            raise ValueError(f"ImageSet: ids must be int64 [{shape[0]}], got {list(self.ids.shape)}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.classes:
            raise ValueError(f"ImageSet: labels of {self.name!r} must lie in 0..{self.classes - 1}, got {low}..{high}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def places(self) -> Tensor:
        """Which images of the source these are: int64 [N], on the CPU."""
        return torch.arange(len(self)) if self.ids is None else self.ids

    @property
    def kept(self) -> Kept:
        """Facts of these images that a network trained on them needs to know."""
        return Kept(self.mean, self.std, self.class_names)

    @property
    def task(self) -> Task:
        """The classification task of these images."""
        return Task(self.name, self.classes, size=self.images.shape[-1], channels=self.images.shape[1])

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The task, as a tuple of one: a `SceneSet` has several."""
        return (self.task,)

    def only(self, names: Sequence[str]) -> ImageSet:
        """Return the set itself, which has one task: a `SceneSet` keeps the tasks named."""
        return self

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Split into (kept, held out): the second part has the share `share` of the images (see `stratified_split`)."""
        kept, held_out = stratified_split(self.labels, share, seed)
        return self.subset(kept), self.subset(held_out)

    def examples(self, index: Tensor | slice) -> list[Example]:
        """One entry: the task, normalised images float32 [n, C, H, W] without augmentation, labels int64 [n]."""
        return [(self.name, self.inputs(index), self.labels[index])]

    def augmented_examples(self, drawn: Drawn) -> list[Example]:
        """One entry, as `examples` gives it, of images that are padded, cropped and mirrored as drawn.

        One gather for the whole batch: image b reads the rows top_b .. top_b + H - 1 and the columns left_b ..
        left_b + W - 1 of its padded self, the columns in reverse order when it is mirrored. The border is not stored.
        """
        index, top, left, *mirrored = drawn
        height, width = self.images.shape[2:]
        device = self.images.device
        rows, columns = top + torch.arange(height), left + torch.arange(width)  # [n, H], [n, W]
        if mirrored:
            columns = torch.where(mirrored[0], columns.flip(1), columns)
        index, rows, columns = (sent(places, device) for places in (index, rows - self.pad, columns - self.pad))
        pixels = self.images.permute(0, 2, 3, 1)[
            index[:, None, None], rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
        ]
        inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        pixels.mul_((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None])
        return [(self.name, self._normalise(pixels), self.labels[sent(drawn[0], self.labels.device)])]

    def to(self, device: torch.device) -> ImageSet:
        """Copy the set to a device: labels and batches lie there, and the images too where they fit (`fits`).

        Images that do not fit stay on the host; each batch of them is copied when it is drawn.
        """
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        images = self.images.to(device) if fits(self.images.nbytes, free) else self.images
        return dataclasses.replace(self, images=images, labels=self.labels.to(device))

    def subset(self, index: Tensor) -> ImageSet:
        """The images at `index` (int64 [n]), in that order."""
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index], ids=self.places[index])

    def inputs(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Normalised images without augmentation: float32 [n, C, H, W], channels-last."""
        if isinstance(index, Tensor):
            index = sent(index, self.images.device)
        return self._normalise(self.images[index].permute(0, 2, 3, 1))

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Draw how `count` images are augmented: first row and column of the crop, int64 [n, 1]; where `flip` also
        whether it is mirrored, bool [n, 1]."""
        corners = torch.randint(2 * self.pad + 1, (2, count, 1), generator=generator)
        return (*corners, torch.rand(count, 1, generator=generator) < 0.5) if self.flip else (*corners,)

    def _normalise(self, pixels: Tensor) -> Tensor:  # uint8 [n, H, W, C] -> float32 [n, C, H, W]
        pixels = sent(pixels.contiguous(), self.labels.device)  # of images that stay on the host
        factor, shift = self._scaling
        return pixels.float().mul_(factor).sub_(shift).permute(0, 3, 1, 2)

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor]:
        """Factor and shift float32 [C] that bring pixels to mean 0 and standard deviation 1, where the labels lie."""
        mean, std = (sent(torch.tensor(values), self.labels.device) for values in (self.mean, self.std))
        return 1 / (255 * std), mean / std


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


def fits(size: int, free: int | None) -> bool:
    """Return True if `size` bytes of images take at most half of `free` bytes of a device; None: no limit."""
    return free is None or size <= free // 2


def pixel_moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of uint8 [N, C, H, W], divided by 255, in double precision."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)  # [C, 256]
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share @ value.square() - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def resized(image_set: ImageSet, size: int) -> ImageSet:
    """Scale the images to `size` x `size` pixels: means over areas to shrink, bilinear to enlarge."""
    mode = "area" if size <= image_set.images.shape[-1] else "bilinear"
    parts = [
        F.interpolate(part.float(), (size, size), mode=mode).round().to(torch.uint8)
        for part in image_set.images.split(1000)
    ]
    return dataclasses.replace(image_set, images=torch.cat(parts))


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide `total` into whole numbers in proportion to `shares`, by largest remainder, earlier ones first.

    >>> apportion(10, [1, 1, 2])
    [3, 2, 5]
    """
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts


def split_by_image(sets: Sequence[ImageSet], held_out: float, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Positions (kept, held out) of each set, so that an image that several sets have is on the same side in all.

    A set whose images no other has is split as `stratified_split` does; of sets of one source that with the most
    classes decides first.
    """
    sides: dict[str, Tensor] = {}  # of each source: int8, 0 kept, 1 held out, -1 not decided yet
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for k in sorted(range(len(sets)), key=lambda k: -sets[k].classes):
        images, places = sets[k], sets[k].places
        known = sides.get(images.source or f"set {k}", torch.empty(0, dtype=torch.int8))
        side = F.pad(known, (0, max(0, int(places.max()) + 1 - len(known))), value=-1)
        undecided = (side[places] < 0).nonzero().flatten()
        if len(undecided):
            kept, held = stratified_split(images.labels[undecided], held_out, seed)
            side[places[undecided[kept]]], side[places[undecided[held]]] = 0, 1
        sides[images.source or f"set {k}"] = side
        found[k] = ((side[places] == 0).nonzero().flatten(), (side[places] == 1).nonzero().flatten())
    return [found[k] for k in range(len(sets))]


def stratified_split(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions at random, class by class, into (kept, held out), each sorted: int64 [N - n], int64 [n].

    `n = ceil(held_out * N)`; the classes have parts in proportion to their sizes.

    Args:
        labels: int64 [N].
    """
    labels, generator = labels.cpu(), torch.Generator().manual_seed(seed)  # positions for images on any device
    sizes = labels.bincount().tolist()
    counts = apportion(math.ceil(held_out * len(labels)), sizes)
    kept, held = [], []
    for label, count in enumerate(counts):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values
