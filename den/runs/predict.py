"""Predictions of a trained network for pictures that it has not seen: class, structure and cost of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from den.data.decode import squared
from den.data.images import ImageSet, Kept
from den.evaluate.accuracy import full_flops
from den.inference.engine import Engine
from den.nn.count import count_flops
from den.nn.tasks import Task
from den.runs.state import check_kind
from den.runs.trained import Run, open_run
from den.support.device import choose_device

if TYPE_CHECKING:
    from den.runs.engine_folder import EnginePredictor

Picture = str | Path | Image.Image
BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """A network's answer for one picture and task, and what it spent on it."""

    image: str  # its path, or its number where it was given as a picture
    task: str
    label: str  # the likeliest class: its name, or its number where the run knows no names
    confidence: float  # probability of it, 0..1
    top: tuple[tuple[str, float], ...]  # the likeliest classes and their probabilities, the likeliest first
    levels: tuple[int, ...]  # [N], the level of every block
    flops: float  # of the blocks
    flops_ratio: float  # of the full structure's


@dataclass(frozen=True)
class Answers:
    """Result of a network for B images of one task."""

    logits: Tensor  # [B, classes]
    levels: Tensor  # integer [B, N]
    flops: Tensor  # [B], of the levels
    full: float  # FLOPs of the full structure


class Classifier(ABC):
    """A network, ready for pictures: of a run, or of an engine's folder.

    Attributes:
        tasks: names of what it classifies.
        level_flops: FLOPs of each block at each level, [N, L].
        skips: whether level 0 leaves a block out.
    """

    level_flops: Tensor
    skips: bool

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        self._tasks, self._device = tuple(tasks), device
        self.tasks = tuple(task.name for task in tasks)

    @property
    @abstractmethod
    def kept(self) -> dict[str, Kept]:
        """Facts of each task's images, by its name: what `Engine.save_pretrained` wants to know of them."""

    @abstractmethod
    def answers(self, images: Tensor, task: Task) -> Answers:
        """The answers for images [B, C, S, S] of a task, on the network's device."""

    def task(self, name: str) -> Task:
        """The task of a name, or of a folder's the last part; ValueError where there is none."""
        return named_task(name, self._tasks)

    @property
    def size(self) -> int:
        """Side of the largest images that it takes."""
        return max(task.size for task in self._tasks)

    def classes(self, task: str) -> tuple[str, ...]:
        """Names of the classes of a task, by their numbers."""
        found = self.task(task)
        return names_of(self.kept[found.name], found.classes)

    def predict(
        self, pictures: Picture | Sequence[Picture], task: str | None = None, *, top: int = 5
    ) -> list[Prediction]:
        """Predictions for pictures (paths, or pictures of Pillow), in their order, each picture's tasks together.

        Args:
            task: the name of one, or of a folder's the last part; None: all that the network has learnt.
            top: number of classes in `Prediction.top`.

        Raises:
            ValueError: no such task, a picture that cannot be read, which is named.
        """
        given = [pictures] if isinstance(pictures, str | Path | Image.Image) else list(pictures)
        tasks = [self.task(task)] if task is not None else list(self._tasks)
        found: list[Prediction] = []
        for start in range(0, len(given), BATCH):
            part = given[start : start + BATCH]
            names = [str(k + start) if isinstance(each, Image.Image) else str(each) for k, each in enumerate(part)]
            of_tasks = [self._predicted(part, names, each, top) for each in tasks]
            found += [prediction for of_picture in zip(*of_tasks, strict=True) for prediction in of_picture]
        return found

    @torch.inference_mode()
    def _predicted(
        self, pictures: Sequence[Picture], names: Sequence[str], task: Task, top: int
    ) -> Iterator[Prediction]:
        found = self.answers(self.inputs(pictures, names, task), task)
        classes = self.classes(task.name)
        return rows(names, task.name, classes, found.logits, found.levels, found.flops, found.full, top)

    def inputs(self, pictures: Sequence[Picture], names: Sequence[str], task: Task) -> Tensor:
        """Pictures as the network reads them for a task: float32 [B, C, S, S] on its device."""
        squares = []
        for name, picture in zip(names, pictures, strict=True):
            try:
                squares.append(squared(picture if isinstance(picture, Image.Image) else Path(picture), task.size))
            except Exception as error:  # Pillow raises exceptions of all kinds on damaged files
                raise ValueError(f"predict: {name} must be a picture that can be read, got {error}") from error
        return network_inputs(squares, task, self.kept[task.name]).to(self._device)


class Predictor(Classifier):
    """A trained run, ready for pictures.

    `den.load("runs/flowers").predict("rose.jpg")[0].label` is the name of a class.

    Attributes:
        run: the run, its network in evaluation mode, frozen, on the device.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.model = run, run.model
        super().__init__(run.model.tasks, next(run.model.parameters()).device)
        self._full = full_flops(run.model)
        self.level_flops = run.model.estimator.level_flops.cpu().double()
        self.skips = not run.model.estimator.level_parameters[:, 0].any()

    @property
    def kept(self) -> dict[str, Kept]:
        """Facts of each task's images, from the run; of older runs from the set itself."""
        from den.data.sets import normalisation

        kept, root = self.run.kept, self.run.config.data.root
        return {name: kept[name] if name in kept else normalisation(name, root) for name in self.tasks}

    def engine(self, **options: Any) -> Engine:
        """The run's network in an engine of its own, to be steered, saved and served: `network.engine(flops=0.6, ...)`.

        options: those of `Engine`. Raises ValueError for them, and for a run whose structures no selector chooses.
        """
        if self.run.config.mode != "den":
            raise ValueError(f"engine: run must be one with a selector (mode den), got {self.run.config.mode}")
        engine = Engine(open_run(self.run.folder, self.run.name).model, **options)
        engine.kept = self.kept
        return engine

    def answers(self, images: Tensor, task: Task) -> Answers:
        """The answers for images [B, C, S, S], at the structures that the run's rule gives them."""
        given = self.run.structures(images, task.name)
        full = torch.full((len(images), self.model.num_blocks), self.model.levels - 1, device=images.device)
        levels = full if given is None else given
        logits = self.model.estimator(images, task.name, levels)
        return Answers(logits, levels, count_flops(self.model, levels), self._full)


def named_task(name: str, tasks: Sequence[Task]) -> Task:
    """The task of a name, or of a folder's the last part; ValueError, which lists the tasks, where there is none."""
    for task in tasks:
        if name in (task.name, task.name.partition("@")[0], Path(task.name.partition("@")[0]).name):
            return task
    raise ValueError(f"predict: task must be one of {', '.join(task.name for task in tasks)}, got {name!r}")


def names_of(kept: Kept, classes: int) -> tuple[str, ...]:
    """Names of classes by their numbers; of those without a name the number."""
    return kept.class_names or tuple(map(str, range(classes)))


def network_inputs(squares: Sequence[Image.Image], task: Task, kept: Kept) -> Tensor:
    """Pictures in RGB of a task's size as the network reads them: float32 [B, C, S, S]."""
    pixels = [np.asarray(square if task.channels == 3 else square.convert("L")) for square in squares]
    images = torch.from_numpy(np.stack(pixels)).view(len(pixels), task.size, task.size, -1).permute(0, 3, 1, 2)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return ImageSet(task.name, images, labels, task.classes, kept.mean, kept.std).inputs()


def rows(
    names: Sequence[str],
    task: str,
    classes: Sequence[str],
    logits: Tensor,
    levels: Tensor,
    flops: Tensor,
    full: float,
    top: int,
) -> Iterator[Prediction]:
    """Predictions of images by a network's logits [B, classes], at levels [B, N], which cost flops [B] of `full`."""
    chances, order = logits.float().softmax(-1).cpu().topk(min(top, len(classes)))
    found = zip(names, chances.tolist(), order.tolist(), levels.cpu().tolist(), flops.cpu().tolist(), strict=True)
    for name, chance, best, structure, cost in found:
        likeliest = tuple((classes[k], p) for k, p in zip(best, chance, strict=True))
        yield Prediction(name, task, *likeliest[0], likeliest, tuple(structure), cost, cost / full)


def load(
    folder: str | Path, *, checkpoint: Literal["last", "best"] = "last", device: str = "auto"
) -> Predictor | EnginePredictor:
    """The network of a folder, ready for pictures: `den.load("runs/flowers").predict("rose.jpg")`.

    Args:
        folder: of a run, which `den train` wrote, or of an engine, which `Engine.save_pretrained` wrote.
        checkpoint: of a run the last one, or the best on held-out images.
        device: auto, cpu, cuda, cuda:N.

    Raises:
        ValueError: no run or engine there, or a damaged one; a device that does not exist.
    """
    from den.runs.engine_folder import EnginePredictor, holds_engine, open_engine

    folder = Path(folder)
    if holds_engine(folder):
        return EnginePredictor(open_engine(folder, "load", device=device))
    check_kind(folder, "model")
    opened = open_run(folder, checkpoint)
    opened.model.to(choose_device(device)).freeze()
    return Predictor(opened)
