"""Record of what `den evaluate` measures of a run: dataclasses, and evaluation.json in the run's folder."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from den.data import ImageSet
from den.evaluate.accuracy import TaskReport, evaluate
from den.evaluate.null import shuffled_accuracy, untrained_report
from den.evaluate.timing import Timing, time_per_image
from den.nn.count import ParameterCounts, count_parameters
from den.nn.model import DeepElasticNetwork
from den.runs.state import Training, training_of
from den.runs.trained import Run
from den.support.device import machine_name
from den.support.files import write_text
from den.support.progress import progress
from den.support.settings import from_dict, to_dict
from den.train.checkpoint import read_updates
from den.train.config import TrainConfig
from den.train.folder import stored_config, versions

VERSION = 1
NAME = "evaluation.json"
MOST = 30  # structures that are listed


@dataclass(frozen=True)
class Chosen:
    """A structure and its share of a task's images."""

    levels: str  # a digit per block
    share: float  # 0..1


@dataclass(frozen=True)
class Budget:
    """Cost that an operating point was chosen to have: see `den.evaluate.operating`."""

    unit: str  # "flops" (share of the full structure's) or "ms" (per image)
    limit: float
    weights: dict  # task -> lambda


@dataclass(frozen=True)
class Null:
    """Results of the same images under choices that have learnt nothing (`den.evaluate.null`)."""

    structures: int  # different ones that an untrained selector gives them
    variety: float  # entropy of these, nats
    information: float  # nats per block, as `TaskResult.information`
    usage: tuple[float, ...]  # [N], mean share of each block
    shuffled: float  # accuracy, 0..1, where every image runs at the structure that was chosen for another


@dataclass(frozen=True)
class Static:
    """Results of the best single structure for all images, of many that cost about what the chosen ones do."""

    levels: str  # a digit per block
    candidates: int  # that were tried
    accuracy: float  # 0..1
    flops_ratio: float  # of the full structure's
    held_out: bool  # chosen on held-out images; False: on the test images themselves


@dataclass(frozen=True)
class TaskResult:
    """Results of one task on its test images."""

    task: str
    classes: int
    images: int
    accuracy: float  # 0..1
    loss: float  # mean cross-entropy
    flops: float  # mean per image, of the blocks
    flops_ratio: float  # of the full structure's
    parameters: float  # mean number of weights of the blocks that an image uses
    usage: tuple[float, ...]  # [N], mean share of each block's
    structures: int  # different ones in use
    variety: float  # entropy of the structures in use, nats
    entropy: float  # of one image's distribution, mean over images and blocks, nats
    mean_entropy: float  # of the mean distribution, mean over blocks, nats
    probabilities: tuple[tuple[float, ...], ...]  # [N, L], mean distribution
    histogram: tuple[tuple[int, ...], ...]  # [N, L], images that ran a block at a level
    common: tuple[Chosen, ...]  # the structures used most
    timing: Timing | None = None  # seconds per image on `Evaluation.machine`; None: not measured
    majority: float | None = None  # share of the most frequent class; None: not known
    null: Null | None = None  # of a network that chooses; None: not measured
    static: Static | None = None  # None: not measured
    cost_correlation: float | None = None  # rank correlation of an image's FLOPs with a dense network's loss

    @property
    def information(self) -> float:
        """Information in the choice about the image, nats per block: 0 where all images have the same distribution."""
        return self.mean_entropy - self.entropy

    @property
    def chance(self) -> float:
        """Accuracy of the best answer that looks at no image, 0..1."""
        return max(1 / self.classes, self.majority or 0.0)


@dataclass(frozen=True)
class Evaluation:
    """Results of a run.  `settings` are those of its config.json."""

    settings: dict
    checkpoint: Literal["last", "best"]
    updates: int  # that the checkpoint has seen
    parameters: ParameterCounts
    tasks: tuple[TaskResult, ...]
    machine: str  # device and threads
    versions: dict = field(default_factory=versions)
    budget: Budget | None = None
    training: Training | None = None  # how far the run had come; None: not known
    variant: str = ""  # "random" or "level-2" in place of the run's own choice (`den.runs.variants`)
    version: int = VERSION

    @property
    def unfinished(self) -> str:
        """Progress of a run that had not finished, in words; empty for a finished one."""
        return self.training.words if self.training else ""

    @property
    def method(self) -> str:
        mode = self.settings["mode"]
        if self.variant.startswith("level") and mode not in ("nestednet", "packnet"):
            return "level"
        return "random" if self.variant == "random" else mode

    @property
    def scenario(self) -> str | None:
        return self.settings.get("scenario")

    @property
    def backbone(self) -> str:
        return self.settings["network"]["backbone"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def accuracy(self) -> float:
        """Mean over tasks, 0..1."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    @property
    def flops(self) -> float:
        """Mean over tasks."""
        return sum(task.flops for task in self.tasks) / len(self.tasks)


def evaluate_run(
    run: Run, sets: Sequence[ImageSet], *, time: bool = False, budget: Budget | None = None
) -> tuple[Evaluation, dict[str, TaskReport]]:
    """Measure a run on test sets, one for each of its tasks: the record, and the reports with the images' structures.

    time: measure the time per image too, on the device that the run's network is on.
    """
    model = run.model
    results: list[TaskResult] = []
    reports: dict[str, TaskReport] = {}
    rule = None if run.choice == "selected" else run.structures
    for image_set in progress(sets, f"evaluate {run.folder.name}", shown=run.config.progress):
        name = image_set.name
        reports[name] = evaluate(model, [image_set], run.choice)[name]
        timing = time_per_image(model, image_set, structures=rule) if time else None
        null = null_of(model, image_set, reports[name], run.config.seed) if run.choice == "selected" else None
        results.append(_result(model, reports[name], image_set, timing, null))
    device = next(model.parameters()).device
    where = machine_name(device)
    updates, checkpoint = read_updates(run.checkpoint), run.name
    training = training_of(run.folder, stored_config(run.folder), checkpoint)  # a variant's config is another
    record = Evaluation(
        to_dict(run.config),
        checkpoint,
        updates,
        count_parameters(model),
        tuple(results),
        where,
        budget=budget,
        training=training,
    )
    return record, reports


def null_of(model: DeepElasticNetwork, image_set: ImageSet, report: TaskReport, seed: int) -> Null:
    """The variety of an untrained selector's structures, and the worth of the chosen ones to other images."""
    untrained = untrained_report(model, image_set, seed)
    return Null(
        untrained.structures,
        untrained.variety,
        untrained.mean_entropy - untrained.entropy,
        tuple(untrained.usage.tolist()),
        shuffled_accuracy(model, image_set, report.levels, seed),
    )


def _result(
    model: Any, report: TaskReport, image_set: ImageSet, timing: Timing | None, null: Null | None
) -> TaskResult:
    same = {f.name for f in dataclasses.fields(TaskReport)} & {f.name for f in dataclasses.fields(TaskResult)}
    values = {name: getattr(report, name) for name in same - {"probabilities", "usage"}}
    structures, counts = report.common
    chosen = zip(structures[:MOST].tolist(), (counts / report.images).tolist(), strict=False)
    sizes = model.estimator.level_parameters.cpu().double()
    return TaskResult(
        **values,
        classes=image_set.classes,
        parameters=(report.histogram * sizes).sum().item() / report.images,
        usage=tuple(report.usage.tolist()),
        variety=report.variety,
        probabilities=tuple(map(tuple, report.probabilities.tolist())),
        histogram=tuple(map(tuple, report.histogram.tolist())),
        common=tuple(Chosen("".join(map(str, levels)), share) for levels, share in chosen),
        timing=timing,
        majority=image_set.labels.bincount().max().item() / len(image_set),
        null=null,
    )


def write_evaluation(path: Path, record: Evaluation) -> None:
    """Write a record as JSON, as a whole or not at all."""
    write_text(path, json.dumps(to_dict(record), indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """The record of a file that `write_evaluation` wrote.

    Raises:
        ValueError: no JSON, a record of another version, keys or values that do not fit.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"evaluation: {path} must be a readable JSON file, got {error}") from error
    found = values.get("version") if isinstance(values, dict) else None
    if found != VERSION:
        again = f"measure the run again: den evaluate {path.parent}"
        raise ValueError(f"evaluation: version of {path} must be {VERSION}, got {found} ({again})")
    return from_dict(Evaluation, values, where=str(path))


def is_current(record: Evaluation, checkpoint: Path, config: TrainConfig) -> bool:
    """True where a record was measured on this checkpoint with these settings, after all updates that it has now."""
    try:
        same = _settled(from_dict(TrainConfig, record.settings)) == _settled(config)
    except ValueError:  # of another version, or another command
        return False
    return same and checkpoint.stem == record.checkpoint and read_updates(checkpoint) == record.updates


def _settled(config: TrainConfig) -> TrainConfig:
    """Settings without what may change between training and measuring."""
    data = dataclasses.replace(config.data, root=None)
    return dataclasses.replace(config, out=Path(), device="auto", progress=True, data=data)


def result_lines(result: TaskResult) -> list[str]:
    """The numbers of a task in words, for a terminal."""
    lines = [
        f"{result.task}: {result.images} images, accuracy {100 * result.accuracy:.2f} %,"
        f" {result.flops / 1e6:.2f} MFLOP per image ({result.flops_ratio:.3f} of the full structure),"
        f" {result.structures} structures in use, entropy {result.entropy:.3f} nats,"
        f" of the mean distribution {result.mean_entropy:.3f}"
    ]
    if timing := result.timing:
        lines.append(
            f"{result.task}: {1e6 * timing.dense:.1f} us per image at the full structure,"
            f" {1e6 * timing.selected:.1f} us selected ({1e6 * timing.selector:.1f} us of it the selector):"
            f" {timing.speedup:.2f} times as fast at {timing.flops_ratio:.3f} of the FLOPs"
        )
    return lines


def gain_lines(result: TaskResult) -> list[str]:
    """Lines on the gain over a single structure, and on where FLOPs are spent, in words; none if not measured."""
    lines = []
    if static := result.static:
        lines.append(
            f"{result.task}: best of {static.candidates} single structures of that cost, chosen on"
            f" {'held-out' if static.held_out else 'the test'} images: accuracy {100 * static.accuracy:.2f} % at"
            f" {static.flops_ratio:.3f}, levels {static.levels}; choosing per image gains"
            f" {100 * (result.accuracy - static.accuracy):+.2f} points"
        )
    if result.cost_correlation is not None:
        lines.append(
            f"{result.task}: rank correlation of an image's FLOPs with the dense network's loss:"
            f" {result.cost_correlation:+.3f}"
        )
    return lines
