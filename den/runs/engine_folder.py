"""Engines that `Engine.save_pretrained` wrote, opened for pictures: their tasks, and how pictures become images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from den.data.images import Kept
from den.inference.engine import Engine
from den.inference.pretrained import CONFIG, IMAGES, WEIGHTS
from den.nn.tasks import Task
from den.runs.predict import Answers, Classifier


@dataclass(frozen=True, eq=False)
class OpenedEngine:
    """An engine with what it classifies: of a converted model one task named "images"."""

    engine: Engine
    tasks: tuple[Task, ...]
    kept: tuple[Kept, ...]
    """Of each task, mean and deviation of the pixels and names of the classes."""


def holds_engine(folder: Path) -> bool:
    """True for a folder that `Engine.save_pretrained` wrote."""
    return (folder / WEIGHTS).is_file()


def open_engine(folder: Path, op: str, *, device: str = "auto", batch: int = 64) -> OpenedEngine:
    """The engine of a folder, for pictures.

    op: what opens it, the first word of errors. Raises ValueError for a folder that holds none, or one that does not
    say how pictures become its images or does not classify.
    """
    engine = Engine.from_pretrained(folder, device=device, max_batch=batch)
    if missing := set(engine.tasks or (IMAGES,)) - set(engine.kept):
        raise ValueError(
            f"{op}: {folder / CONFIG} must say how pictures become images of {', '.join(sorted(missing))}, got"
            " nothing: give save_pretrained their mean, deviation and classes (kept=...)"
        )
    tasks = engine.network.tasks or (_converted_task(engine, folder, op),)
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
                f"{op}: {task.name} of {folder} must classify pictures of 1 or 3 channels with a mean for each, got"
                f" {task.kind}, {task.channels} channels, {len(kept.mean)} means, {task.classes} classes, {named} names"
            )
    return OpenedEngine(engine, tasks, tuple(engine.kept[task.name] for task in tasks))


def _converted_task(engine: Engine, folder: Path, op: str) -> Task:
    """The classification that a converted model does, as a try shows; ValueError where it does something else."""
    if engine.example is None:
        raise ValueError(
            f"{op}: {folder / CONFIG} must say which images the model takes, got none: give Engine an example"
        )
    logits = engine(torch.zeros(engine.example))
    height, width = engine.example[2:]
    if not isinstance(logits, Tensor) or logits.ndim != 2 or height != width:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{op}: the model of {folder} must give [B, classes] of square images, got {shape} of {height} x {width}"
        )
    return Task(IMAGES, logits.shape[1], height, channels=engine.example[1])


class EnginePredictor(Classifier):
    """An engine, ready for pictures, at its own operating point.

    Attributes:
        engine: the `den.Engine`.
    """

    def __init__(self, opened: OpenedEngine) -> None:
        self.engine = opened.engine
        super().__init__(opened.tasks, opened.engine.device)
        network = self.engine.network
        self.level_flops, self.skips = network.costs.levels * network.full_flops, not any(network.lowest)

    @property
    def kept(self) -> dict[str, Kept]:
        """Facts of each task's images, by its name."""
        return self.engine.kept

    def answers(self, images: Tensor, task: Task) -> Answers:
        """The engine's answers for images [B, C, S, S]; of a converted model FLOPs are those of the whole network."""
        name = task.name if self.engine.tasks else None
        logits, levels = self.engine(images, name, return_levels=True)
        network = self.engine.network
        return Answers(logits, levels, (network.costs.of(levels) * network.full_flops).round(), network.full_flops)
