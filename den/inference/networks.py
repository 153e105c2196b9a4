"""Networks as the engine sees them: blocks with levels, tasks, a selector maybe; ready for inference."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import den_kernels
from den.evaluate.operating import LevelCosts, flops_costs
from den.nn.attached import ImageSelector
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den.nn.tasks import Task

_OP = "Engine"


class Network(ABC):
    """A network for inference, on its device and in its dtype.

    Attributes:
        blocks: names of the N blocks.
        levels: L; levels of a block are 0..L-1.
        lowest: the lowest level of each block.
        tasks: of a converted model none.
        costs: FLOPs of each block at each level, the full structure being 1.
        has_selector: whether `logits` gives any.
    """

    blocks: tuple[str, ...]
    levels: int
    lowest: tuple[int, ...]
    tasks: tuple[Task, ...]
    costs: LevelCosts
    full_flops: float
    has_selector: bool

    @abstractmethod
    def batch(self, images: Images, task: Tasks | None) -> TaskBatch:
        """The checked batch of what a caller gave; ValueError for what does not fit."""

    @abstractmethod
    def logits(self, batch: TaskBatch) -> Tensor:
        """The selector's logits [B, N, L], in the batch's own order."""

    def choose(self, batch: TaskBatch) -> Tensor:
        """The selector's most probable levels int64 [B, N], in the batch's own order."""
        return self.logits(batch).argmax(-1)

    @abstractmethod
    def run(self, batch: TaskBatch, levels: Tensor) -> list[Any]:
        """The result of each part of a batch at levels [B, N], in the batch's own order."""

    @abstractmethod
    def modules(self) -> list[nn.Module | None]:
        """The module of each block, to be timed; None where the block is none."""

    def restore(self, batch: TaskBatch, results: list[Any]) -> Any:
        """The results as the caller wants them: of one part alone, of a list a list."""
        return results[0] if batch.form == "one" else results


class ElasticNetwork(Network):
    """A Deep Elastic Network, frozen."""

    has_selector = True

    def __init__(self, model: DeepElasticNetwork, dtype: torch.dtype, device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device, dtype).freeze()
        self.tasks, self.levels = model.tasks, model.levels
        self.blocks = tuple(f"blocks.{n}" for n in range(model.num_blocks))
        self.lowest = (0,) * model.num_blocks
        self.costs, self.full_flops = flops_costs(model), float(model.estimator.level_flops[:, -1].sum())
        self._like = self.model.estimator.heads[0].weight

    def batch(self, images: Images, task: Tasks | None) -> TaskBatch:
        if task is None:
            if len(self.tasks) > 1 or not isinstance(images, Tensor):
                names = ", ".join(each.name for each in self.tasks)
                raise ValueError(f"{_OP}: task must be given for images of several tasks ({names}), got None")
            task = 0
        parts: Any = [images] if isinstance(images, Tensor) else images
        sent = [part.to(self._like.device, self._like.dtype) if _is_image(part) else part for part in parts]
        return task_batch(sent[0] if isinstance(images, Tensor) else sent, task, self.tasks, like=self._like)

    def logits(self, batch: TaskBatch) -> Tensor:
        return self.model.selector.run(batch)

    def choose(self, batch: TaskBatch) -> Tensor:
        return self.model.selector.choose(batch)

    def run(self, batch: TaskBatch, levels: Tensor) -> list[Any]:
        return list(self.model.estimator.part_logits(batch, levels))

    def modules(self) -> list[nn.Module | None]:
        return list(self.model.estimator.blocks)

    def restore(self, batch: TaskBatch, results: list[Any]) -> Any:
        return batch.restore_logits(results, max(task.classes for task in self.tasks))


class ConvertedNetwork(Network):
    """A model that `den_kernels.convert` changed, frozen; with an `ElasticModel` around it, its selector."""

    tasks = ()

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, example: Tensor | None) -> None:
        elastic = model if isinstance(model, den_kernels.ElasticModel) else None
        own = copy.deepcopy(model if elastic is None else elastic.model).to(device, dtype)
        report = den_kernels.report_of(own)
        if example is not None:
            example = example.to(device, dtype)
        counted = den_kernels.level_flops(own, example)
        self.model = den_kernels.freeze(own, example)
        self.selector = None if elastic is None else copy.deepcopy(elastic.selector).to(device, dtype).eval()
        self.blocks = tuple(block.name for block in report)
        self.levels, self.lowest = report.groups + 1, report.lowest
        self.full_flops = float(counted.full)
        self.costs = LevelCosts(counted.blocks.double() / counted.full, counted.rest / counted.full)
        self.has_selector = self.selector is not None
        self._device, self._dtype, self._lowest = device, dtype, torch.tensor(self.lowest, device=device)

    def batch(self, images: Images, task: Tasks | None) -> TaskBatch:
        if task is not None:
            raise ValueError(f"{_OP}: task must be None for a converted model, which has no tasks, got {task!r}")
        if not _is_image(images) or images.ndim != 4:  # type: ignore[union-attr]
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{_OP}: images must be a floating tensor [B, C, H, W], got {got}")
        sent = images.to(self._device, self._dtype)  # type: ignore[union-attr]
        return TaskBatch((0,), (sent.contiguous(memory_format=torch.channels_last),), None, "one")

    def logits(self, batch: TaskBatch) -> Tensor:
        """The selector's logits; of a selector that gives levels alone, 0 for these and -inf for others."""
        assert self.selector is not None
        if isinstance(self.selector, ImageSelector):
            return self.selector.logits(batch.images[0])
        chosen = self.selector(batch.images[0]).maximum(self._lowest)
        return torch.where(torch.arange(self.levels, device=chosen.device) == chosen[..., None], 0.0, -torch.inf)

    def run(self, batch: TaskBatch, levels: Tensor) -> list[Any]:
        with den_kernels.levels(self.model, levels):
            return [self.model(batch.images[0])]

    def modules(self) -> list[nn.Module | None]:
        paths = dict(self.model.named_modules())
        joined = {each.block: each for each in paths.values() if type(each).__name__ == "FrozenBlock"}
        return [joined.get(n, paths.get(name)) if name else None for n, name in enumerate(self.blocks)]


def _is_image(images: Any) -> bool:
    return isinstance(images, Tensor) and images.is_floating_point()


def network_of(model: nn.Module, dtype: torch.dtype, device: torch.device, example: Tensor | None) -> Network:
    """The network that the engine runs: a copy of the model, frozen.

    Raises ValueError for a model that is neither a Deep Elastic Network nor converted.
    """
    if isinstance(model, DeepElasticNetwork):
        return ElasticNetwork(model, dtype, device)
    try:
        den_kernels.report_of(model)
    except ValueError as why:
        raise ValueError(
            f"{_OP}: model must be a DeepElasticNetwork, or one that den_kernels.convert has changed, got "
            f"{type(model).__name__}"
        ) from why
    return ConvertedNetwork(model, dtype, device, example)


@dataclass(frozen=True)
class Piece:
    """At most so many instances of a batch as run together.

    parts: for each part of `batch` the position of the part of the whole batch that it is of.
    """

    batch: TaskBatch
    parts: tuple[int, ...]


def split(batch: TaskBatch, most: int) -> list[Piece]:
    """Pieces of at most `most` instances each, in the batch's own order; one of a batch that is small enough."""
    pieces: list[Piece] = []
    cut: list[tuple[int, int, Tensor]] = []  # position, task and images of the parts of the next piece
    room = most
    for position, (task, part) in enumerate(zip(batch.tasks, batch.images, strict=True)):
        rest = part
        while True:
            cut.append((position, task, rest[:room]))
            taken = len(cut[-1][2])
            rest, room = rest[taken:], room - taken
            if not len(rest):
                break
            pieces.append(_piece(cut))
            cut, room = [], most
    return [*pieces, _piece(cut)]


def _piece(cut: Sequence[tuple[int, int, Tensor]]) -> Piece:
    positions, tasks, images = zip(*cut, strict=True)
    return Piece(TaskBatch(tasks, images, None, "list"), positions)


def joined(parts: int, pieces: Sequence[Piece], results: Sequence[list[Any]]) -> list[Any]:
    """The results of a batch's parts, of those of its pieces: tensors (in tuples, dicts, ...) one after the other."""
    found: list[list[Any]] = [[] for _ in range(parts)]
    for piece, own in zip(pieces, results, strict=True):
        for position, result in zip(piece.parts, own, strict=True):
            found[position].append(result)
    return [each[0] if len(each) == 1 else tree_map(_joined, *each) for each in found]


def _joined(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]
