"""Choice of the trained run that keeps to a budget best, and steering of its selector to that budget."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from den.data import ImageSet
from den.evaluate.accuracy import evaluate
from den.evaluate.operating import at_flops, at_milliseconds
from den.recipes.setup import hold_out
from den.runs.evaluation import Budget
from den.runs.trained import Run, as_trained

STEERED_ON = 2000  # images of each task, at most


def unseen_images(run: Run, data_root: Path | None) -> tuple[list[ImageSet], list[ImageSet]]:
    """Training images of each task without the augmentation: those to steer by, and those held out, to choose by.

    The former are those held out and, where these are fewer than `STEERED_ON`, others that fill them up: steering needs
    no labels.  The latter are empty where the run had none held out.
    """
    from den.data import load_set

    config, root = run.config, data_root or run.config.data.root
    kept = [as_trained(load_set(name, "train", root), run.kept.get(name)) for name in config.data.tasks]
    held: list[ImageSet] = []
    if config.data.validation > 0:
        kept, held = hold_out(kept, config)
    steering = [_filled(held[k : k + 1], rest) for k, rest in enumerate(kept)]
    return steering, held


def _filled(first: list[ImageSet], rest: ImageSet) -> ImageSet:
    """At most `STEERED_ON` images: those of `first`, filled up from `rest`, evenly spread over each."""
    parts, room = [], STEERED_ON
    for part in (*first, rest):
        count = min(len(part), room)
        if count:
            parts.append(part.subset(torch.arange(count) * len(part) // count))
        room -= count
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return dataclasses.replace(rest, images=images, labels=labels, source="", ids=None)


def choose_point(runs: Sequence[Run], budget: Budget, data_root: Path | None = None) -> tuple[Run, Budget]:
    """The operating point within a budget: of the run that is the most accurate there on held-out images.

    Returns:
        The run with its network steered, and the budget with the lambda of each task.

    Raises:
        ValueError: a run without a selector, runs of different tasks, several runs of which one held no images out, a
            budget that no structure meets.
    """
    best: tuple[float, Run, Budget] | None = None
    for run in runs:
        _check(run, runs)
        steering, held_out = unseen_images(run, data_root)
        meet = at_flops if budget.unit == "flops" else at_milliseconds
        model, weights = meet(run.model, steering, budget.limit)
        point = dataclasses.replace(run, model=model, structures=model.select)
        accuracy = 0.0
        if len(runs) > 1:
            accuracy = sum(r.accuracy for r in evaluate(model, held_out).values()) / len(held_out)
            print(f"{run.folder}: accuracy {100 * accuracy:.2f} % on held-out images within the budget")
        if best is None or accuracy > best[0]:
            best = accuracy, point, dataclasses.replace(budget, weights=weights)
    assert best is not None, "at least one run"
    return best[1], best[2]


def _check(run: Run, runs: Sequence[Run]) -> None:
    config = run.config
    if config.mode != "den":
        raise ValueError(
            f"evaluate: run must have a selector to meet a budget, got mode {config.mode!r} ({run.folder})"
        )
    if config.data.tasks != runs[0].config.data.tasks:
        raise ValueError(f"evaluate: runs must be of the same tasks, got {', '.join(config.data.tasks)} ({run.folder})")
    if len(runs) > 1 and config.data.validation == 0:
        raise ValueError(f"evaluate: runs to choose among must hold images out, got validation 0 ({run.folder})")
