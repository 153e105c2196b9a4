"""den evaluate: trained runs on their test sets, as they are or at an operating point that keeps to a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from den.data import ImageSet
from den.data.images import Kept
from den.evaluate.accuracy import equal_structures
from den.runs.evaluation import (
    NAME,
    Budget,
    Evaluation,
    TaskResult,
    evaluate_run,
    gain_lines,
    is_current,
    read_evaluation,
    result_lines,
    write_evaluation,
)
from den.runs.gain import open_dense, with_gain
from den.runs.settings import Evaluate
from den.runs.state import check_kind, training_of
from den.runs.steering import choose_point, unseen_images
from den.runs.trained import Run, as_trained, kept_of, open_run
from den.runs.variants import at_level, with_random_selector
from den.support.device import choose_device
from den.support.files import check_folder, check_own, is_writable
from den.support.settings import to_dict
from den.train.config import TrainConfig
from den.train.folder import stored_config


def main(command: Evaluate) -> None:
    """Print a line of results per task, and those of the comparisons asked for; ValueError for wrong input.

    All that can be wrong is looked at before anything is measured, and a record is written before it is printed.
    """
    command.check()
    folders = record_folders(command.runs, command.out)
    runs = [opened(folder, command.checkpoint, command.device) for folder in command.runs]
    sets = SetsOfRuns(command.data_root)
    for run in runs:
        sets.of(run)
        training = training_of(run.folder, run.config, command.checkpoint)
        if training and not training.finished:
            print(f"{run.folder}: {training.words}", flush=True)
    dense = open_dense(command.dense, runs) if command.dense is not None else None
    limits = {"flops": command.budget_flops, "ms": command.budget_ms}
    for unit, limit in ((unit, limit) for unit, limit in limits.items() if limit is not None):
        run, budget = choose_point(runs, Budget(unit, limit, {}), command.data_root)
        shown = ", ".join(f"{task} {weight:.4g}" for task, weight in budget.weights.items())
        print(f"{run.folder}: lambda of the cost at run time: {shown}", flush=True)
        _report(run, sets.of(run), command, budget, folders[run.folder], dense=dense)
        return
    for run in runs:
        if len(runs) > 1:
            print(f"{run.folder}:", flush=True)
        for each, variant in variants(run, command):
            _report(each, sets.of(run), command, None, folders[run.folder], variant, run.config, dense)


def variants(run: Run, command: Evaluate) -> Iterator[tuple[Run, str]]:
    """The run, or its variants that the command asks for, with their names."""
    if command.selector == "random":
        yield with_random_selector(run, command.random_flops), "random"
    for level in command.levels:
        yield at_level(run, level), f"level-{level}"
    if command.selector == "own" and not command.levels:
        yield run, ""


def record_folders(runs: tuple[Path, ...], out: Path | None) -> dict[Path, Path]:
    """Folder for the record of each run: its own, or `out`, which for several runs gets a folder of each.

    Raises:
        ValueError: one that cannot be written to, or two runs of the same name with `out`.
    """
    if out is None:
        for run in runs:
            if run.is_dir() and not is_writable(run):
                raise ValueError(f"{_unwritable(run)}; write elsewhere with --out FOLDER")
        return {run: run for run in runs}
    several = len(set(runs)) > 1
    places = {run: out / run.resolve().name if several else out for run in runs}
    if len(set(places.values())) < len(places) and several:
        given = ", ".join(map(str, runs))
        raise ValueError(f"evaluate: runs must have different names to be written to {out}, got {given}")
    for place in places.values():
        check_folder(place, "evaluate: out")
        check_own(place / NAME, '"checkpoint"', "evaluate: out")
    return places


def _unwritable(run: Path) -> str:
    return f"evaluate: run folder must be writable for its {NAME}, got {run}"


def opened(folder: Path, checkpoint: Literal["last", "best"], device: str = "auto") -> Run:
    """A run with its network on a device, frozen: nothing is trained here, and its weights are kept once."""
    check_kind(folder, "model")
    run = open_run(folder, checkpoint)
    run.model.to(choose_device(device)).freeze()
    return run


class SetsOfRuns:
    """The test images of runs; each set is loaded once.

    data_root: folder of the sets that do not come with the install; None: where the runs had them.
    """

    def __init__(self, data_root: Path | None = None) -> None:
        self._root = data_root
        self._loaded: dict[tuple[str, Path | None], ImageSet] = {}

    def of(self, run: Run | Measurable) -> list[ImageSet]:
        """The test images of each task of a run, normalised as those that it was trained on.

        ValueError where they are missing or damaged, or their classes are not those that the run has learnt.
        """
        from den.data import load_set

        root = self._root or run.config.data.root
        for name in run.config.data.tasks:
            if (name, root) not in self._loaded:
                self._loaded[name, root] = load_set(name, "test", root)
        return [as_trained(self._loaded[name, root], run.kept.get(name)) for name in run.config.data.tasks]


def _report(
    run: Run,
    sets: list[ImageSet],
    command: Evaluate,
    budget: Budget | None,
    folder: Path,
    variant: str = "",
    settings: TrainConfig | None = None,
    dense: Run | None = None,
) -> None:
    """Measure, write and print; settings: of the run that a variant is of."""
    timed = command.time or command.budget_ms is not None
    record, reports = evaluate_run(run, sets, time=timed, budget=budget)
    held_out = unseen_images(run, command.data_root)[1] if command.static else []
    gained = with_gain(run, sets, held_out, record.tasks, reports, command.static, dense)
    record = dataclasses.replace(record, tasks=gained)
    if variant:
        record = dataclasses.replace(record, settings=to_dict(settings), variant=variant)
        print(f"{run.folder}, {variant}:", flush=True)
    path = folder / file_name(budget, variant)
    write_evaluation(path, record)
    for result in record.tasks:
        lines = [*result_lines(result), *gain_lines(result)]
        if budget is not None:
            lines.append(_budget_line(result, budget))
        print("\n".join(lines), flush=True)
    if run.config.joint and not variant:
        same = equal_structures(list(reports.values()))
        print(f"{', '.join(reports)}: one structure for all labels of {100 * same:.1f} % of the images", flush=True)
    if command.out is not None:
        print(f"{run.folder}: the numbers are in {path}")


def _budget_line(result: TaskResult, budget: Budget) -> str:
    """Line that compares the cost on test images with the budget, which was met on training images."""
    cost, unit = result.flops_ratio, "of the full structure's FLOPs"
    if budget.unit == "ms" and result.timing:
        cost, unit = 1e3 * result.timing.selected, "ms per image"
    return f"{result.task}: {cost:.4g} {unit} against a budget of {budget.limit:g} ({cost / budget.limit - 1:+.1%})"


def file_name(budget: Budget | None, variant: str = "") -> str:
    """evaluation.json; evaluation.flops-0.5.json of an operating point, evaluation.random.json of a variant."""
    if variant:
        return f"evaluation.{variant}.json"
    return NAME if budget is None else f"evaluation.{budget.unit}-{budget.limit:g}.json"


@dataclass(frozen=True, eq=False)
class Measurable:
    """A run whose record is there, or can be made: nothing is missing for it."""

    folder: Path
    config: TrainConfig
    record: Evaluation | None  # of the checkpoint as it is; None: to be measured
    checkpoint: Literal["last", "best"]
    place: Path  # where the record is, or will be
    kept: dict[str, Kept]  # of the images that it was trained on


def look_up(folder: Path, *, time: bool = False, elsewhere: Path | None = None) -> Measurable:
    """A run and its record, if it is current; one without times is not with `time`.

    elsewhere: the folder for the record of a run whose own folder cannot be written to.

    Raises:
        ValueError: no run there, a record of another version, a folder that cannot be written to.
    """
    check_kind(folder, "model")
    config = stored_config(folder)
    checkpoint: Literal["last", "best"] = "last"
    for place in (folder, *([elsewhere] if elsewhere else [])):
        if (place / NAME).exists():
            record = read_evaluation(place / NAME)
            checkpoint = record.checkpoint
            timed = record.tasks and (record.tasks[0].timing or not time)
            if timed and is_current(record, folder / f"{checkpoint}.safetensors", config):
                training = training_of(folder, config, checkpoint)
                kept = kept_of(folder / f"{checkpoint}.safetensors")
                record = dataclasses.replace(record, training=training)
                return Measurable(folder, config, record, checkpoint, place, kept)
    training_of(folder, config, checkpoint)
    run = open_run(folder, checkpoint)  # here, not after others have been measured
    if is_writable(folder):
        return Measurable(folder, config, None, checkpoint, folder, run.kept)
    if elsewhere is None:
        raise ValueError(_unwritable(folder))
    check_folder(elsewhere, "report: out")
    return Measurable(folder, config, None, checkpoint, elsewhere, run.kept)


def measured(run: Measurable, sets: SetsOfRuns, time: bool = False) -> tuple[Evaluation, list[Evaluation]]:
    """The record of a run, measured and written where there is none, and those of its operating points and variants."""
    record = run.record
    if record is None:
        record, _ = evaluate_run(opened(run.folder, run.checkpoint), sets.of(run), time=time)
        write_evaluation(run.place / NAME, record)
    points = [read_evaluation(other) for other in sorted(run.folder.glob("evaluation.*.json"))]
    return record, [p for p in points if p.updates == record.updates and (p.budget or p.variant)]
