"""den evaluate: trained runs on their test sets, as they are or at an operating point that keeps to a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from den.data import ImageSet
from den.device import choose_device
from den.engine import hold_out
from den.evaluate import TaskReport, best_static, evaluate
from den.evaluation import (
    NAME,
    Budget,
    Evaluation,
    TaskResult,
    evaluate_run,
    is_current,
    read_evaluation,
    result_lines,
    write_evaluation,
)
from den.operating import at_flops, at_milliseconds
from den.runs import Run, open_run

STEERED_ON = 2000  # images of each task, at most


@dataclass(frozen=True)
class Evaluate:
    """Measure trained runs on their test sets; the numbers are also written to evaluation.json of the run folder."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run folders.  With a budget: the best of them on held-out images is measured."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints: the last one, or the best on held-out images."""
    data_root: Path | None = None
    """Folder of the sets that do not come with the install; None: where the run had them."""
    static: int = 0
    """Compare with the best of this many single structures of the same cost, chosen on the test images themselves."""
    time: bool = False
    """Measure the time per image, with the full structure and with the selected ones."""
    budget_flops: float | None = None
    """Shift the selector, without training, until every task costs this share of the full structure's FLOPs."""
    budget_ms: float | None = None
    """Shift the selector, without training, until an image of every task takes this long here, in batches of 256."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""


def main(command: Evaluate) -> None:
    """Print a line of results per task, and those of the comparisons asked for; ValueError for wrong input."""
    if not command.runs:
        raise ValueError("evaluate: runs must be at least one run folder, got none")
    if command.budget_flops is not None and command.budget_ms is not None:
        raise ValueError("evaluate: budget must be in FLOPs or in milliseconds, got both")
    runs = [opened(folder, command.checkpoint, command.device) for folder in command.runs]
    if command.budget_flops is not None or command.budget_ms is not None:
        unit, limit = ("flops", command.budget_flops) if command.budget_ms is None else ("ms", command.budget_ms)
        run, budget = choose_point(runs, Budget(unit, limit, {}), command.data_root)
        shown = ", ".join(f"{task} {weight:.4g}" for task, weight in budget.weights.items())
        print(f"{run.folder}: lambda of the cost at run time: {shown}")
        _report(run, command, budget)
        return
    for run in runs:
        if len(runs) > 1:
            print(f"{run.folder}:")
        _report(run, command, None)


def opened(folder: Path, checkpoint: Literal["last", "best"], device: str = "auto") -> Run:
    """A run with its network on a device, frozen: nothing is trained here, and its weights are kept once."""
    run = open_run(folder, checkpoint)
    run.model.to(choose_device(device)).freeze()
    return run


def _report(run: Run, command: Evaluate, budget: Budget | None) -> None:
    sets = sets_of(run, command.data_root)
    timed = command.time or command.budget_ms is not None
    record, reports = evaluate_run(run, sets, time=timed, budget=budget)
    for image_set, result in zip(sets, record.tasks, strict=True):
        lines = result_lines(result)
        if command.static:
            lines.insert(1, _static_line(run, image_set, reports[image_set.name], command.static))
        if budget is not None:
            lines.append(_budget_line(result, budget))
        print("\n".join(lines))
    write_evaluation(run.folder / file_name(budget), record)


def _budget_line(result: TaskResult, budget: Budget) -> str:
    """What the test images cost against the budget, which was met on training images."""
    if budget.unit == "flops":
        cost, unit = result.flops_ratio, "of the full structure's FLOPs"
    else:
        cost, unit = 1e3 * result.timing.selected, "ms per image"
    return f"{result.task}: {cost:.4g} {unit} against a budget of {budget.limit:g} ({cost / budget.limit - 1:+.1%})"


def _static_line(run: Run, image_set: ImageSet, report: TaskReport, candidates: int) -> str:
    found = best_static(run.model, image_set, report.flops, extra=report.common[0], candidates=candidates)
    levels = "".join(map(str, found.structure.tolist()))
    return (
        f"{report.task}: best of {found.candidates} single structures of that cost:"
        f" accuracy {100 * found.report.accuracy:.2f} % at {found.report.flops_ratio:.3f}, levels {levels}"
    )


def file_name(budget: Budget | None) -> str:
    """evaluation.json, or evaluation.flops-0.5.json of an operating point."""
    return NAME if budget is None else f"evaluation.{budget.unit}-{budget.limit:g}.json"


def evaluations(folder: Path, data_root: Path | None = None, time: bool = False) -> tuple[Evaluation, list[Evaluation]]:
    """The record of a run and those of its operating points.

    The run is measured where it has no record, one of fewer updates, or with `time` one without times.

    Raises:
        ValueError: no run there, or a record of another version.
    """
    path = folder / NAME
    record = read_evaluation(path) if path.exists() else None
    checkpoint = folder / f"{record.checkpoint if record else 'last'}.safetensors"
    if record is None or not is_current(record, checkpoint) or (time and record.tasks[0].timing is None):
        run = opened(folder, checkpoint.stem)
        record, _ = evaluate_run(run, sets_of(run, data_root), time=time)
        write_evaluation(path, record)
    points = [read_evaluation(other) for other in sorted(folder.glob("evaluation.*-*.json"))]
    return record, [point for point in points if point.updates == record.updates]


def sets_of(run: Run, data_root: Path | None) -> list[ImageSet]:
    """The test images of each task of a run."""
    from den.data import load_set

    return [load_set(name, "test", data_root or run.config.data.root) for name in run.config.data.tasks]


def unseen_images(run: Run, data_root: Path | None) -> tuple[list[ImageSet], list[ImageSet]]:
    """Training images of each task without the augmentation: those to steer by, and those held out, to choose by.

    The former are those held out and, where these are fewer than `STEERED_ON`, others that fill them up: steering needs
    no labels.  The latter are empty where the run had none held out.
    """
    from den.data import load_set

    config, root = run.config, data_root or run.config.data.root
    kept, held = [load_set(name, "train", root) for name in config.data.tasks], []
    if config.data.validation > 0:
        kept, held = hold_out(kept, config)
    steering = [_filled(held[k : k + 1], rest) for k, rest in enumerate(kept)]
    return steering, held


def _filled(first: list[ImageSet], rest: ImageSet) -> ImageSet:
    """At most `STEERED_ON` images: of `first`, and what is left over of `rest`, each spread evenly."""
    parts, room = [], STEERED_ON
    for part in (*first, rest):
        count = min(len(part), room)
        if count:
            parts.append(part.subset(torch.arange(count) * len(part) // count))
        room -= count
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return dataclasses.replace(rest, images=images, labels=labels)


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
