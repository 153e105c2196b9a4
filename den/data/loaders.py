"""Data loaders of a user's own as streams of mixed-task batches, and as sets that are measured."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from den.data.batches import Batch
from den.data.images import Example
from den.nn.tasks import Task
from den.support.device import CPU, sent
from den.support.randomness import random_state, set_random_state

Loaders = DataLoader[Any] | Mapping[str, DataLoader[Any]]
"""One loader of ``(images, {task: targets})`` for tasks of the same images; or by task loaders of ``(images,
targets)``."""


@dataclass(frozen=True, eq=False)
class LoaderSet:
    """A loader and the tasks that it has targets of, in the order of its loader's name."""

    tasks: tuple[Task, ...]
    loader: DataLoader[Any]
    shared: bool  # one tensor of images for all tasks, and a dictionary of targets
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def batches(self) -> Iterator[list[Example]]:
        """Batches in the loader's order, once through: task, images and targets."""
        for values in self.loader:
            yield self.taken(values)

    def taken(self, values: Any) -> list[Example]:
        """A loader's batch as an entry for each task, on the device.

        Raises ValueError for what is not a pair, targets that lack a task, and numbers of them that are not the
        images'.
        """
        names = ", ".join(task.name for task in self.tasks)
        wanted = "(images, {task: targets})" if self.shared else "(images, targets)"
        if not isinstance(values, tuple | list) or len(values) != 2 or not isinstance(values[0], Tensor):
            raise ValueError(f"fit: loader of {names} must give {wanted}, got {_shape(values)}")
        images, targets = values
        if self.shared and (not isinstance(targets, Mapping) or any(t.name not in targets for t in self.tasks)):
            got = sorted(targets) if isinstance(targets, Mapping) else _shape(targets)
            raise ValueError(f"fit: loader must give a dictionary with targets of {names}, got {got}")
        images = sent(images.contiguous(memory_format=torch.channels_last), self.device) if images.ndim == 4 else images
        found = []
        for task in self.tasks:
            target = targets[task.name] if self.shared else targets
            if not isinstance(target, Tensor) or len(target) != len(images):
                got = _shape(target)
                raise ValueError(f"fit: targets of {task.name} must be {len(images)}, as the images, got {got}")
            found.append((task.name, images, sent(target, self.device)))
        return found


class LoaderBatches:
    """Endless batches of loaders, each gone through anew when it has ended: the stream that a run trains on.

    Every pass begins with generators that are seeded by its number, so that a continued run gets the batches that it
    would have had: it goes through those of the pass that it stopped in once more.
    """

    def __init__(self, sets: Sequence[LoaderSet], seed: int) -> None:
        self.sets, self.seed = tuple(sets), seed
        self.epoch_steps = max(len(each.loader) for each in self.sets)
        self._passes, self._taken = [0] * len(self.sets), [0] * len(self.sets)
        self._iterators: list[Iterator[Any] | None] = [None] * len(self.sets)

    def next(self) -> Batch:
        """The next batch: one of every loader."""
        examples = [example for k, each in enumerate(self.sets) for example in each.taken(self._next(k))]
        tasks, images, labels = zip(*examples, strict=True)
        return Batch(tasks, list(images), list(labels))

    def close(self) -> None:
        """Do nothing: the loaders are their owner's."""

    def state_dict(self) -> dict[str, Any]:
        """The position that `load_state_dict` of the same loaders continues from."""
        return {"cursors": [*self._passes, *self._taken]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of `state_dict`; ValueError for one of another number of loaders."""
        cursors = [int(c) for c in state["cursors"]]
        if len(cursors) != 2 * len(self.sets):
            raise ValueError(f"LoaderBatches: state must be of {len(self.sets)} loaders, got {len(cursors) // 2}")
        self._passes, taken = cursors[: len(self.sets)], cursors[len(self.sets) :]
        for k, count in enumerate(taken):
            self._iterators[k], self._taken[k] = None, 0
            for _ in range(count):
                self._next(k)

    def _next(self, k: int) -> Any:
        iterator = self._iterators[k]
        if iterator is not None:
            self._taken[k] += 1
            try:
                return next(iterator)
            except StopIteration:
                self._passes[k], self._taken[k] = self._passes[k] + 1, 0
        values, self._iterators[k] = self._begun(k)
        self._taken[k] += 1
        return values

    def _begun(self, k: int) -> tuple[Any, Iterator[Any]]:
        """The first batch of a pass and the iterator of the others; torch draws its seeds when the first is asked
        for."""
        loader, tensors = self.sets[k].loader, random_state()
        seed = (self.seed * 1_000_003 + self._passes[k]) % 2**63
        try:
            torch.manual_seed(seed)
            if loader.generator is not None:
                loader.generator.manual_seed(seed)
            iterator = iter(loader)
            for values in iterator:
                return values, iterator
        finally:
            set_random_state(*tensors)
        raise ValueError(f"fit: loader of {self.sets[k].tasks[0].name} must give at least one batch, got none")


def loader_sets(loaders: Loaders, tasks: Sequence[Task], device: torch.device = CPU) -> list[LoaderSet]:
    """The sets of loaders; ValueError for loaders of other tasks, or what is no loader."""
    if isinstance(loaders, DataLoader):
        return [LoaderSet(tuple(tasks), loaders, True, device)]
    names = [task.name for task in tasks]
    if not isinstance(loaders, Mapping) or sorted(loaders) != sorted(names):
        got = ", ".join(loaders) if isinstance(loaders, Mapping) else type(loaders).__name__
        raise ValueError(f"fit: loaders must be one DataLoader, or one for each of {', '.join(names)}, got {got}")
    return [LoaderSet((task,), loaders[task.name], False, device) for task in tasks]


def halves(each: LoaderSet, seed: int) -> tuple[LoaderSet, LoaderSet]:
    """A set in two, at random, whose batches are drawn anew in every pass.

    Raises ValueError for a loader whose data set has no positions or whose batches are a sampler's of its own.
    """
    loader, name = each.loader, each.tasks[0].name
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None or len(each) < 2:
        raise ValueError(
            f"fit: loader of {name} must have a data set of positions and a batch_size to be halved for the search;"
            " give such a loader, or choose training.search='joint'"
        )
    order = torch.randperm(len(each), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
    first, second = (
        DataLoader(
            Subset(loader.dataset, part), min(loader.batch_size, len(part)), shuffle=True, drop_last=True,
            num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn, persistent_workers=loader.persistent_workers,
        )
        for part in parts
    )  # fmt: skip
    return dataclasses.replace(each, loader=first), dataclasses.replace(each, loader=second)


def _shape(value: Any) -> str:
    """A value that came, in a few words."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
