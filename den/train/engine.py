"""Everything that training needs and Algorithm 1 does not say: optimisers, phases, measurements, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from den.data import Batch, ImageSet, load_set
from den.data.images import stratified_split
from den.evaluate.accuracy import TaskReport, evaluate, full_flops
from den.nn.count import count_flops
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.nn.selector import SelectorConfig
from den.nn.tasks import Task
from den.recipes import method_of
from den.support.device import choose_device
from den.support.progress import Progress
from den.support.randomness import random_state, seeded, set_random_state
from den.train.checkpoint import (
    load_weights,
    optimiser_tensors,
    prefixed,
    reading,
    restore_optimiser,
    save_checkpoint,
    unprefixed,
)
from den.train.config import EstimatorTraining, NetworkConfig, TrainConfig, from_dict
from den.train.folder import RunFolder
from den.train.objective import Objective, RunningBaseline
from den.train.phases import Phase

Place = TypeVar("Place")


@dataclass
class Position:
    """Where a run stands; all of it is in a checkpoint."""

    phase: int = 0  # phases done
    step: int = 0  # updates done in the phase at hand
    total_steps: int = 0
    selector_steps: int = 0
    epoch: int = 0
    lowest_loss: float = math.inf  # of an epoch of the phase at hand
    stale_epochs: int = 0  # since then
    best_score: float = math.inf  # of the checkpoint "best"


class Engine:
    """A run of `config`: created in its folder, or continued from the last checkpoint there.

    From its construction on it holds the folder, and the global generators go on from the run's seed.  Use it as a
    context manager: that closes the folder, leaves the last checkpoint as it is on any exit, and puts the generators
    back where they stood.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        self.config, self.meter = config, Meter()
        self.device = choose_device(config.device)
        self._bar: Progress | None = None
        with contextlib.ExitStack() as stack:
            self.folder = stack.enter_context(RunFolder(config, resume=resume))
            stack.enter_context(seeded(config.seed, self.device))
            stack.callback(self._close_bar)
            self._build()
            if resume:
                self._restore()
            self.folder.begin()
            if not resume:
                self._save(self.folder.last, self.folder.best)
            self._exit = stack.pop_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _build(self) -> None:
        config = self.config
        train_sets = [load_set(name, "train", config.data.root) for name in config.data.tasks]
        train_sets, held_out = hold_out(train_sets, config)
        train_sets, self.held_out = ([s.to(self.device) for s in sets] for sets in (train_sets, held_out))
        self.model = new_model(config.network, [s.task for s in train_sets], config.seed).to(self.device)
        self.method = method_of(self.model, config)
        self.phases = self.method.phases()
        self.batches = self.method.batches(train_sets)
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.baseline = RunningBaseline(config.data.tasks)
        self.optimisers = {
            "estimator": estimator_optimiser(self.model.estimator, config.estimator, **self.method.faster()),
            "selector": torch.optim.Adam(self.method.policy_parameters(), lr=config.selector.phase.rate),
        }
        self.position = Position()
        self._full_flops = full_flops(self.model)

    @property
    def progress(self) -> float:
        """Share of the phase at hand that is done."""
        return self.position.step / self.phases[self.position.phase].settings.steps

    def flops_ratio(self, structures: Tensor | None) -> Tensor | float:
        """Mean FLOPs of structures [B, N] over those of the full one."""
        return 1.0 if structures is None else count_flops(self.model, structures).mean() / self._full_flops

    def autocast(self) -> torch.autocast:
        """The precision that the settings ask for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def phase(self, network: str, stage: int) -> Iterator[Batch]:
        """Batches of a phase until it ends; none if it is done already, or no part of the run.

        The network in question trains, the other rests in evaluation mode.  Every epoch is measured, logged and saved.
        """
        here = self.position
        while here.phase < len(self.phases):
            phase = self.phases[here.phase]
            if (phase.network, phase.stage) != (network, stage):
                return
            self._enter(phase)
            for name, rate in phase.trained.items():
                for group in self.optimisers[name].param_groups:
                    group["lr"] = rate * phase.scale(here.step) * group.get("factor", 1.0)
            yield self.batches.next()
            if here.step % self._epoch_steps() == 0 or here.step == phase.settings.steps:
                self._end_epoch(phase)

    def update(self, objective: Objective) -> None:
        """One step of the optimiser of the phase at hand."""
        here = self.position
        phase = self.phases[here.phase]
        if self.device.type == "cpu":  # elsewhere looking at every loss would wait for the device
            check_finite(objective.loss.item(), here.total_steps)
        optimisers = [self.optimisers[name] for name in phase.trained]
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        objective.loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        here.step += 1
        here.total_steps += 1
        here.selector_steps += "selector" in phase.trained
        self.meter.add(objective.measured)
        if self._bar is not None:
            self._bar.update()
            if self.device.type == "cpu" or here.step % 50 == 0:
                self._bar.note(self.meter.text(), refresh=False)

    def _epoch_steps(self) -> int:
        return self.config.epoch_steps or self.batches.epoch_steps

    def _enter(self, phase: Phase) -> None:
        self.model.estimator.train("estimator" in phase.trained)
        self.model.selector.train("selector" in phase.trained)
        self.method.prepare(self, phase)
        if self._bar is None and self.config.progress:
            name = f"stage {phase.stage} {phase.network}"
            self._bar = Progress(phase.settings.steps, name, unit="update", initial=self.position.step)

    def _end_epoch(self, phase: Phase) -> None:
        """Measure, log, decide whether the phase has ended, save."""
        here, means = self.position, self.meter.means()
        check_finite(means["loss"], here.total_steps)
        here.epoch += 1
        reports = evaluate(self.model, self.held_out, self.method.choice(phase))
        where = {"epoch": here.epoch, "step": here.total_steps, "stage": phase.stage, "phase": phase.network}
        rate = phase.rate(here.step - 1)
        held_out = {name: report.summary() for name, report in reports.items()}
        self.folder.log({**where, "rate": rate, "train": means, "held_out": held_out})
        if self._bar is not None:
            self._bar.note(f"{self.meter.text()} | {_held_out_text(reports)}")
        if here.step == phase.settings.steps or self._converged(phase, means["loss"]):
            self._leave()
        self.meter.clear()
        best = [self.folder.best] if self._is_best(phase, reports) else []
        self._save(*best, self.folder.last)  # last: where the run stands is known to all that was written before

    def _converged(self, phase: Phase, loss: float) -> bool:
        here, settings = self.position, phase.settings
        if loss < here.lowest_loss * (1 - settings.tolerance):
            here.lowest_loss, here.stale_epochs = loss, 0
        else:
            here.stale_epochs += 1
        return settings.until == "converge" and here.stale_epochs >= settings.patience

    def _leave(self) -> None:
        here = self.position
        here.phase, here.step, here.lowest_loss, here.stale_epochs = here.phase + 1, 0, math.inf, 0
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_best(self, phase: Phase, reports: dict[str, TaskReport]) -> bool:
        """Whether the mean over tasks of L + S is the lowest so far; until epochs can be compared, always."""
        rho = self.config.selector.rho
        score = sum(r.loss + rho * r.penalty for r in reports.values()) / len(reports)
        if not self.method.comparable(phase) or self.config.data.validation == 0:
            return True
        if score >= self.position.best_score:
            return False
        self.position.best_score = score
        return True

    def _save(self, *paths: Path) -> None:
        tensors = prefixed("model", self.model.state_dict())
        for name, optimiser in self.optimisers.items():
            tensors |= prefixed(f"optimiser.{name}", optimiser_tensors(optimiser))
        batches = self.batches.state_dict()
        tensors |= prefixed("batches", {k: v for k, v in batches.items() if isinstance(v, Tensor)})
        states, generators = random_state(self.device)
        tensors |= {"generator": self.generator.get_state(), **states}
        record: dict[str, Any] = {
            "model": self.model.config.to_dict(),
            "position": dataclasses.asdict(self.position),
            "cursors": batches["cursors"],
            "baseline": self.baseline.means,
            **generators,
        }
        for path in paths:
            save_checkpoint(path, tensors, record)

    def _restore(self) -> None:
        path = self.folder.last
        tensors, record = self.folder.load()
        load_weights(self.model, tensors, path)
        with reading(path):
            for name, optimiser in self.optimisers.items():
                restore_optimiser(optimiser, unprefixed(f"optimiser.{name}", tensors))
            self.batches.load_state_dict({**unprefixed("batches", tensors), "cursors": record["cursors"]})
            self.position = restored_position(Position, record["position"])
            self.baseline.means = {task: record["baseline"][task] for task in self.config.data.tasks}
            self.generator.set_state(tensors["generator"])
            set_random_state(tensors, record, self.device)
        self.folder.rewind(self.position.epoch)


def restored_position(kind: type[Place], values: dict[str, Any]) -> Place:
    """A position of class `kind` from a checkpoint's record; KeyError or ValueError for one that is not whole."""
    return from_dict(kind, {field.name: values[field.name] for field in dataclasses.fields(kind)}, "position")


def check_finite(loss: float, step: int) -> None:
    """ValueError for a loss, after so many updates, that is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"train: loss must stay finite, got {loss} at step {step} (lower the rate)")


class Meter:
    """Means of what the updates of an epoch measured."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0

    def add(self, measured: dict[str, Tensor | float]) -> None:
        self._count += 1
        for name, value in measured.items():
            on_device = isinstance(value, Tensor) and value.device.type != "cpu"
            self._sums[name] = self._sums.get(name, 0.0) + (value.double() if on_device else float(value))

    def means(self) -> dict[str, float]:
        return {name: float(total) / self._count for name, total in self._sums.items()}

    def text(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.means().items())

    def clear(self) -> None:
        self._sums, self._count = {}, 0


def _held_out_text(reports: dict[str, TaskReport]) -> str:
    parts = (f"{r.task} {r.accuracy:.1%} at {r.flops_ratio:.2f}, {r.structures} structures" for r in reports.values())
    return "; ".join(parts)


def hold_out(sets: list[ImageSet], config: TrainConfig) -> tuple[list[ImageSet], list[ImageSet]]:
    """Training sets, the share that is asked for, and what epochs are measured on: a part of them, or the test sets."""
    if config.data.share < 1:
        sets = [s.subset(stratified_split(s.labels, 1 - config.data.share, config.seed)[0]) for s in sets]
    if config.data.validation == 0:
        return sets, [load_set(name, "test", config.data.root) for name in config.data.tasks]
    splits = [stratified_split(s.labels, config.data.validation, config.seed) for s in sets]
    kept = [s.subset(split[0]) for s, split in zip(sets, splits, strict=True)]
    return kept, [s.subset(split[1]) for s, split in zip(sets, splits, strict=True)]


def new_model(network: NetworkConfig, tasks: list[Task], seed: int) -> DeepElasticNetwork:
    """The network of `network` for `tasks`, its weights drawn with `seed`; global generators stay as they were."""
    selector = SelectorConfig(network.selector_channels) if network.selector_channels else None
    config = ModelConfig(
        tuple(tasks),
        backbone=network.backbone,
        stages=network.stages or None,
        stem=network.stem,
        levels=network.levels,
        trunk_size=network.trunk_size,
        selector=selector,
    )
    with seeded(seed):
        return DeepElasticNetwork(config)


def estimator_optimiser(
    estimator: nn.Module, settings: EstimatorTraining, faster: Sequence[nn.Parameter] = (), factor: float = 1.0
) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay spares biases and norms unless `decay_all`.

    The parameters `faster` learn at `factor` times the rate of the others, without weight decay.
    """
    apart = {id(p) for p in faster}
    everything = [p for p in estimator.parameters() if id(p) not in apart]
    matrices = [p for p in everything if p.ndim > 1 or settings.decay_all]
    vectors = [p for p in everything if p.ndim <= 1 and not settings.decay_all]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": list(faster), "weight_decay": 0.0, "factor": factor},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.first.rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )
