"""The network that is served, from a folder; pictures to predictions, those of all tasks at once."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from den.data.decode import squared
from den.data.images import Kept
from den.evaluate.accuracy import Structures
from den.inference.engine import Engine
from den.inference.pretrained import CONFIG, IMAGES, WEIGHTS
from den.nn.tasks import Task
from den.runs.predict import Prediction, Predictor, names_of, network_inputs, rows
from den.runs.state import check_kind
from den.runs.trained import open_run

TOP = 5  # classes of an answer, where a request does not say


@dataclass(frozen=True, eq=False)
class Item:
    """One picture for one task."""

    task: int  # its position among the network's
    square: Image.Image  # RGB, of the task's size
    top: int = TOP


@dataclass(frozen=True, eq=False)
class ServedNetwork:
    """A network in an engine, with what turns pictures into its images and its results into words.

    Attributes:
        tasks: what it classifies; of a converted model one named "images".
        kept: of each task, mean and deviation of the pixels and names of the classes.
        structures: the rule for levels of a compared method; None: the engine's.
    """

    engine: Engine
    tasks: tuple[Task, ...]
    kept: tuple[Kept, ...]
    structures: Structures | None = None

    def classes(self, task: int) -> tuple[str, ...]:
        """Names of the classes of a task, by their numbers."""
        return names_of(self.kept[task], self.tasks[task].classes)

    def decoded(self, body: bytes, tasks: Sequence[int], top: int, most: int) -> list[Item]:
        """The picture of a body for each of the tasks; raises what Pillow does, TooManyPixels above `most` pixels."""
        sizes = {self.tasks[k].size for k in tasks}
        squares = {size: squared(io.BytesIO(body), size, most=most) for size in sizes}
        return [Item(k, squares[self.tasks[k].size], top) for k in tasks]

    @torch.inference_mode()
    def predictions(self, items: Sequence[Item]) -> list[Prediction]:
        """The prediction of each item, in their order; those of all tasks are one batch of the engine."""
        own = {k: [n for n, item in enumerate(items) if item.task == k] for k in sorted({item.task for item in items})}
        inputs = {k: self._inputs(k, [items[n].square for n in places]) for k, places in own.items()}
        results, levels = self._run(inputs)
        flops = (self.engine.network.costs.of(levels) * self.engine.network.full_flops).round()
        found: dict[int, Prediction] = {}
        sizes, full = [len(places) for places in own.values()], self.engine.network.full_flops
        parts = zip(own.items(), results, levels.split(sizes), flops.split(sizes), strict=True)
        for (k, places), logits, structures, cost in parts:
            top, task = max(items[n].top for n in places), self.tasks[k].name
            made = rows([""] * len(places), task, self.classes(k), logits, structures, cost, full, top)
            found |= {n: replace(each, top=each.top[: items[n].top]) for n, each in zip(places, made, strict=True)}
        return [found[n] for n in range(len(items))]

    def _inputs(self, task: int, squares: Sequence[Image.Image]) -> Tensor:
        return network_inputs(squares, self.tasks[task], self.kept[task]).to(self.engine.device)

    def _run(self, inputs: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Logits of each task's images, and levels [B, N] in the order of the tasks."""
        if not self.engine.tasks:
            logits, levels = self.engine(inputs[0], return_levels=True)
            return [logits], levels
        names = [self.tasks[k].name for k in inputs]
        given = None if self.structures is None else self._given(inputs, self.structures)
        return self.engine(list(inputs.values()), names, levels=given, return_levels=True)

    def _given(self, inputs: dict[int, Tensor], rule: Structures) -> Tensor:
        chosen = []
        for k, images in inputs.items():
            own = rule(images, self.tasks[k].name)
            full = images.new_full((len(images), len(self.engine.blocks)), self.engine.network.levels - 1)
            chosen.append(full.long() if own is None else own)
        return torch.cat(chosen)


def open_network(
    folder: Path, *, checkpoint: Literal["last", "best"] = "last", device: str = "auto", batch: int = 64
) -> ServedNetwork:
    """The network of a folder that `den train` or `Engine.save_pretrained` wrote, tried with a black picture.

    Raises ValueError for a folder that holds neither, an engine that does not say how pictures become its images, a
    network that does not classify.
    """
    folder = Path(folder)
    kind = _of_engine if (folder / WEIGHTS).is_file() else _of_run(checkpoint)
    found = kind(folder, device, batch)
    black = [Item(k, Image.new("RGB", (task.size, task.size))) for k, task in enumerate(found.tasks)]
    found.predictions(black)
    return found


def _of_run(checkpoint: Literal["last", "best"]) -> Callable[[Path, str, int], ServedNetwork]:
    def opened(folder: Path, device: str, batch: int) -> ServedNetwork:
        check_kind(folder, "model")
        run = open_run(folder, checkpoint)
        engine, kept = Engine(run.model, max_batch=batch, device=device), Predictor(run).kept
        run.model.to(engine.device)
        rule = None if run.config.mode == "den" else run.structures
        return ServedNetwork(engine, run.model.tasks, tuple(kept[task.name] for task in run.model.tasks), rule)

    return opened


def _of_engine(folder: Path, device: str, batch: int) -> ServedNetwork:
    engine = Engine.from_pretrained(folder, device=device, max_batch=batch)
    if missing := set(engine.tasks or (IMAGES,)) - set(engine.kept):
        raise ValueError(
            f"serve: {folder / CONFIG} must say how pictures become images of {', '.join(sorted(missing))}, got"
            " nothing: give save_pretrained their mean, deviation and classes (kept=...)"
        )
    tasks = engine.network.tasks or (_converted_task(engine, folder),)
    for task in tasks:
        kept = engine.kept[task.name]
        named = len(kept.class_names)
        if (
            task.dense
            or len(kept.mean) != task.channels
            or task.channels not in (1, 3)
            or named not in (0, task.classes)
        ):
            raise ValueError(
                f"serve: {task.name} of {folder} must classify pictures of 1 or 3 channels with a mean for each, got"
                f" {task.kind}, {task.channels} channels, {len(kept.mean)} means, {task.classes} classes, {named} names"
            )
    return ServedNetwork(engine, tasks, tuple(engine.kept[task.name] for task in tasks))


def _converted_task(engine: Engine, folder: Path) -> Task:
    """The classification that a converted model does, as a try shows; ValueError where it does something else."""
    if engine.example is None:
        raise ValueError(
            f"serve: {folder / CONFIG} must say which images the model takes, got none: give Engine an example"
        )
    logits = engine(torch.zeros(engine.example))
    height, width = engine.example[2:]
    if not isinstance(logits, Tensor) or logits.ndim != 2 or height != width:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"serve: the model of {folder} must give [B, classes] of square images, got {shape} of {height} x {width}"
        )
    return Task(IMAGES, logits.shape[1], height, channels=engine.example[1])
