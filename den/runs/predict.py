"""Predictions of a trained run for pictures that it has not seen: class, structure and cost of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


class Predictor:
    """A trained run, ready for pictures.

    `den.load("runs/flowers").predict("rose.jpg")[0].label` is the name of a class.

    Attributes:
        run: the run, its network in evaluation mode, frozen, on the device.
        tasks: names of what it has learnt.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.model = run, run.model
        self.tasks = tuple(task.name for task in run.model.tasks)
        self._full = full_flops(run.model)

    @property
    def kept(self) -> dict[str, Kept]:
        """Facts of each task's images, by its name: what `Engine.save_pretrained` wants to know of them."""
        return {task.name: self._kept(task) for task in self.model.tasks}

    def classes(self, task: str) -> tuple[str, ...]:
        """Names of the classes of a task, by their numbers."""
        found = named_task(task, self.model.tasks)
        return names_of(self._kept(found), found.classes)

    def predict(
        self, pictures: Picture | Sequence[Picture], task: str | None = None, *, top: int = 5
    ) -> list[Prediction]:
        """Predictions for pictures (paths, or pictures of Pillow), in their order, each picture's tasks together.

        Args:
            task: the name of one, or of a folder's the last part; None: all that the run has learnt.
            top: number of classes in `Prediction.top`.

        Raises:
            ValueError: no such task, a picture that cannot be read, which is named.
        """
        given = [pictures] if isinstance(pictures, str | Path | Image.Image) else list(pictures)
        tasks = [named_task(task, self.model.tasks)] if task is not None else list(self.model.tasks)
        found: list[Prediction] = []
        for start in range(0, len(given), BATCH):
            part = given[start : start + BATCH]
            names = [str(k + start) if isinstance(each, Image.Image) else str(each) for k, each in enumerate(part)]
            of_tasks = [self._predicted(part, names, each, top) for each in tasks]
            found += [prediction for of_picture in zip(*of_tasks, strict=True) for prediction in of_picture]
        return found

    def engine(self, **options: Any) -> Engine:
        """The run's network in an engine of its own, to be steered, saved and served: `network.engine(flops=0.6, ...)`.

        options: those of `Engine`. Raises ValueError for them, and for a run whose structures no selector chooses.
        """
        if self.run.config.mode != "den":
            raise ValueError(f"engine: run must be one with a selector (mode den), got {self.run.config.mode}")
        engine = Engine(open_run(self.run.folder, self.run.name).model, **options)
        engine.kept = self.kept
        return engine

    def _kept(self, task: Task) -> Kept:
        """Facts of a task's images, from the run; of older runs from the set itself."""
        if task.name in self.run.kept:
            return self.run.kept[task.name]
        from den.data.sets import normalisation

        return normalisation(task.name, self.run.config.data.root)

    @torch.inference_mode()
    def _predicted(
        self, pictures: Sequence[Picture], names: Sequence[str], task: Task, top: int
    ) -> Iterator[Prediction]:
        images = self.inputs(pictures, names, task)
        given = self.run.structures(images, task.name)
        full = torch.full((len(images), self.model.num_blocks), self.model.levels - 1, device=images.device)
        levels = full if given is None else given
        logits = self.model.estimator(images, task.name, levels)
        flops = count_flops(self.model, levels)
        return rows(names, task.name, self.classes(task.name), logits, levels, flops, self._full, top)

    def inputs(self, pictures: Sequence[Picture], names: Sequence[str], task: Task) -> Tensor:
        """Pictures as the network reads them for a task: float32 [B, C, S, S] on its device."""
        squares = []
        for name, picture in zip(names, pictures, strict=True):
            try:
                squares.append(squared(picture if isinstance(picture, Image.Image) else Path(picture), task.size))
            except Exception as error:  # Pillow raises exceptions of all kinds on damaged files
                raise ValueError(f"predict: {name} must be a picture that can be read, got {error}") from error
        return network_inputs(squares, task, self._kept(task)).to(next(self.model.parameters()).device)


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


def load(run: str | Path, *, checkpoint: Literal["last", "best"] = "last", device: str = "auto") -> Predictor:
    """The network of a run folder, ready for pictures: `den.load("runs/flowers").predict("rose.jpg")`.

    Args:
        run: folder that `den train` wrote.
        checkpoint: the last one, or the best on held-out images.
        device: auto, cpu, cuda, cuda:N.

    Raises:
        ValueError: no run there, or a damaged one; a device that there is not.
    """
    folder = Path(run)
    check_kind(folder, "model")
    opened = open_run(folder, checkpoint)
    opened.model.to(choose_device(device)).freeze()
    return Predictor(opened)
