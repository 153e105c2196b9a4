"""The network that is served, from a folder; pictures to predictions, those of all tasks at once."""

import io
from collections.abc import Sequence
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
from den.nn.tasks import Task
from den.runs.engine_folder import holds_engine, open_engine
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
    """The network of a folder that `den train` or `Engine.save_pretrained` wrote, tried on a black picture.

    Raises ValueError for a folder that holds neither, an engine that does not say how pictures become its images, a
    network that does not classify.
    """
    folder = Path(folder)
    if holds_engine(folder):
        opened = open_engine(folder, "serve", device=device, batch=batch)
        found = ServedNetwork(opened.engine, opened.tasks, opened.kept)
    else:
        found = _of_run(folder, checkpoint, device, batch)
    black = [Item(k, Image.new("RGB", (task.size, task.size))) for k, task in enumerate(found.tasks)]
    found.predictions(black)
    return found


def _of_run(folder: Path, checkpoint: Literal["last", "best"], device: str, batch: int) -> ServedNetwork:
    check_kind(folder, "model")
    run = open_run(folder, checkpoint)
    engine, kept = Engine(run.model, max_batch=batch, device=device), Predictor(run).kept
    run.model.to(engine.device)
    rule = None if run.config.mode == "den" else run.structures
    return ServedNetwork(engine, run.model.tasks, tuple(kept[task.name] for task in run.model.tasks), rule)
