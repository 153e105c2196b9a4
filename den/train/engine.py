"""The engine of every run: phases, batches, optimisers, measurements, checkpoints; a recipe says what they are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from den.data import Batch, BatchStream
from den.nn.norms import share_statistics
from den.support import ranks
from den.support.progress import Progress
from den.support.randomness import random_state, seeded, set_random_state
from den.support.settings import from_dict
from den.train.checkpoint import (
    load_checkpoint,
    load_weights,
    optimiser_tensors,
    prefixed,
    reading,
    restore_optimiser,
    save_checkpoint,
    unprefixed,
)
from den.train.config import RunConfig
from den.train.folder import RunFolder
from den.train.formats import LAYOUT, upgraded
from den.train.gradients import GradientMeans
from den.train.objective import Objective
from den.train.phases import Phase
from den.train.recipe import Recipe
from den.train.sharding import Shards

R = TypeVar("R", bound=Recipe)


@dataclass
class Position:
    """Position of a run in its schedule; a checkpoint holds all of it."""

    phase: int = 0  # phases done
    step: int = 0  # updates done in the phase at hand
    total_steps: int = 0
    epoch: int = 0
    lowest_loss: float = math.inf  # of an epoch of the phase at hand
    stale_epochs: int = 0  # since then
    best_score: float = math.inf  # of the checkpoint "best"
    updates: dict[str, int] = field(default_factory=dict)  # of each optimiser


class Engine(Generic[R]):
    """A run of `config`: created in its folder, or continued from the last checkpoint there.

    From its construction on it holds the folder, and the global generators go on from the run's seed.  Use it as a
    context manager: that closes the folder, leaves the last checkpoint as it is on any exit, and puts the generators
    back where they stood.

    Where torchrun has started several processes, all of them make an engine and do the same with it: each computes its
    share of every batch (`MixedTaskBatches`), gradients are the means over the processes, statistics of batch norms
    those of the whole batch, and the first process alone writes the folder and shows progress.

    Args:
        config: settings of the run.
        prepare: makes the run's recipe of the settings and the device.
        resume: continue the run in the folder.

    Attributes:
        model, batches, optimisers: the recipe's network, streams of batches and optimisers.
    """

    def __init__(self, config: RunConfig, prepare: Callable[[Any, torch.device], R], *, resume: bool = False) -> None:
        self.config: Any = config
        self.position, self.meter = Position(), Meter()
        self.device = ranks.join(config.device)
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self._bar: Progress | None = None
        self._piece, self._pieces = 0, config.accumulate
        self._cut: dict[str, list[Batch]] = {}
        self._means: dict[tuple[str, ...], GradientMeans] = {}
        with contextlib.ExitStack() as stack:
            self.folder = stack.enter_context(RunFolder(config, resume=resume))
            stack.enter_context(seeded(config.seed, self.device))
            stack.callback(self._close_bar)
            self.recipe = prepare(config, self.device)
            self.model: Any = self.recipe.model
            self.batches: Mapping[str, BatchStream] = self.recipe.batches
            self.optimisers: dict[str, torch.optim.Optimizer] = self.recipe.optimisers
            stack.callback(self._close_batches)
            self.recipe.check_pieces(ranks.count(), self._pieces)
            self.phases = self.recipe.phases()
            self._restore() if self.folder.resume else self.recipe.begin(self)
            self._shards = Shards(self.optimisers) if config.sharding == "zero2" and ranks.count() > 1 else None
            if ranks.count() > 1:
                share_statistics(self.model, self.recipe.norms_apart())
                if not ranks.first():  # dropout is each process's own
                    torch.manual_seed(config.seed + ranks.rank() + 65537 * self.position.total_steps)
            self.folder.begin()
            if not self.folder.resume:
                self.save(*([self.folder.best] if self.recipe.keeps_best else []))
            self._exit = stack.pop_all()

    def __enter__(self) -> Engine[R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()
        if isinstance(error, RuntimeError) and ranks.is_loss_of_another(error):
            reason = str(error).split("] ")[-1].split(". ")[0]
            raise ValueError(f"train: all processes of the run must stay alive, got {reason}") from error

    @property
    def progress(self) -> float:
        """Share of the phase at hand that is done."""
        return self.position.step / self.phases[self.position.phase].settings.steps

    @property
    def epoch_steps(self) -> int:
        """Updates between measurements and checkpoints, in the phase at hand."""
        return self.config.epoch_steps or self.recipe.epoch_steps(self.phases[self.position.phase])

    def autocast(self) -> torch.autocast:
        """The precision that the settings ask for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def phase(self, *key: str | int) -> Iterator[Batch]:
        """Batches of the phase of this key until it ends; none if it is done already, or no part of the run.

        With `accumulate` pieces of batches, each of which draws from the generator what the whole would.  Every epoch
        is measured, logged and saved.
        """
        here, entered, epoch = self.position, None, 0
        while here.phase < len(self.phases):
            phase = self.phases[here.phase]
            if phase is not entered:
                if phase.key != key:
                    return
                if phase.settings.steps == 0:
                    self.save(*self._leave(phase))
                    continue
                self._enter(phase)
                entered, epoch = phase, self.epoch_steps
            self._set_rates(phase)
            state = self.generator.get_state() if self._pieces > 1 else None
            for piece in range(self._pieces):
                self._piece = piece
                if state is not None:
                    self.generator.set_state(state)
                yield self.batch(phase.stream)
            if here.step % epoch == 0 or here.step == phase.settings.steps:
                self._end_epoch(phase)
                entered = None

    def batch(self, stream: str) -> Batch:
        """The next batch of a stream; with `accumulate` the piece of it whose turn it is."""
        if self._pieces == 1:
            return self.batches[stream].next()
        if self._piece == 0:
            self._cut[stream] = self.batches[stream].next().pieces(self._pieces)
        return self._cut[stream][self._piece]

    def update(self, objective: Objective) -> None:
        """Make one step of the optimisers of the phase at hand, or of those that the objective names.

        An objective without measurements is a part of an update that another objective completes.  Of the pieces of a
        batch all but the last only add to the gradients.
        """
        here, phase = self.position, self.phases[self.position.phase]
        if self.device.type == "cpu":  # elsewhere looking at every loss would wait for the device
            check_finite(ranks.mean(objective.loss).item(), here.total_steps)
        names, last = tuple(objective.optimisers or phase.trained), self._piece == self._pieces - 1
        self._backward(objective, names, last)
        for name in names if last else ():
            self.optimisers[name].step()
            here.updates[name] = here.updates.get(name, 0) + 1
        if last and self._shards is not None:
            self._shards.spread(self._learnt(names))
        if objective.measured is None:
            return
        self.meter.add(objective.measured)
        if not last:
            return
        here.step += 1
        here.total_steps += 1
        if self._bar is not None:
            self._bar.update()
            if self.device.type == "cpu" or here.step % 50 == 0:
                self._bar.note(told(self.meter.means()), refresh=False)

    def _backward(self, objective: Objective, names: tuple[str, ...], last: bool) -> None:
        """Add an objective's gradients to those of the optimisers named, or begin them; the last ones are shared."""
        loss = objective.loss / self._pieces if self._pieces > 1 else objective.loss
        learnt = self._learnt(names)
        if self._piece == 0:
            for parameter in learnt:
                parameter.grad = None
        if objective.backward is not None:  # of the whole batch in one process: see `Recipe.check_pieces`
            objective.backward()
            return
        if not last or ranks.count() == 1:
            loss.backward(inputs=learnt)
            return
        key = (*names, *(str(id(parameter)) for parameter in learnt))
        if key not in self._means:
            of = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self._means[key] = GradientMeans([(of.get(id(p), "of the objective"), p) for p in learnt], self._shards)
        with self._means[key].taken():
            loss.backward(inputs=learnt)
        if self.position.step % self.epoch_steps == 0:
            self._means[key].check()

    def _learnt(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """The parameters that some optimisers change."""
        groups = [group for name in names for group in self.optimisers[name].param_groups]
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def save(self, *paths: Path) -> None:
        """Write the run as it stands to `paths` and to the last checkpoint."""
        tensors = prefixed("model", self.model.state_dict())
        optimised: dict[str, list[str]] = {}
        cursors: dict[str, list[int]] = {}
        for name, optimiser in self.optimisers.items():
            kept = self._shards.whole_state(optimiser) if self._shards else optimiser_tensors(optimiser)
            optimised[name] = sorted(kept)  # in one order, whether the run was continued or not
            tensors |= prefixed(f"optimiser.{name}", kept)
        for name, batches in self.batches.items():
            state = batches.state_dict()
            cursors[name] = state.pop("cursors")
            tensors |= prefixed(f"batches.{name}", state)
        states, generators = random_state(self.device)
        tensors |= {"generator": self.generator.get_state(), **states}
        record = {
            "layout": LAYOUT,
            **self.recipe.record(),
            "position": dataclasses.asdict(self.position),
            "cursors": cursors,
            "optimisers": optimised,
            **generators,
        }

        def write() -> None:
            for path in (*paths, self.folder.last):  # last: all that was written before it is known to it
                save_checkpoint(path, tensors, record)

        ranks.from_first(write)

    def take_over(self, path: Path) -> None:
        """Go on with the weights of another run's checkpoint, and with its batches from where they stood."""
        tensors, record = ranks.from_first(lambda: load_checkpoint(path))
        load_weights(self.model, tensors, path)
        with reading(path):
            self._restore_batches(*upgraded(tensors, record))

    def _enter(self, phase: Phase) -> None:
        """Begin a phase, or go on with it after a measurement."""
        self.recipe.enter(self, phase)
        if self._bar is None and self.config.progress and ranks.first():
            self._bar = Progress(phase.settings.steps, phase.title, unit="update", initial=self.position.step)

    def _set_rates(self, phase: Phase) -> None:
        scale = phase.scale(self.position.step)
        for name, rate in phase.trained.items():
            for group in self.optimisers[name].param_groups:
                group["lr"] = rate * scale * group.get("factor", 1.0)

    def _end_epoch(self, phase: Phase) -> None:
        """Measure, log, decide whether the phase has ended, save."""
        here, means = self.position, self._shared_means()
        for name, mean in means.items():
            if "loss" in name:
                check_finite(mean, here.total_steps)
        here.epoch += 1
        measured = self.recipe.measure(self, phase)
        where = {"epoch": here.epoch, "step": here.total_steps, **phase.labels, "rate": phase.rate(here.step - 1)}
        self.folder.log({**where, "train": means, **measured.line})
        if self._bar is not None:
            self._bar.note(" | ".join(filter(None, (told(means), measured.text))))
        paths = [self.folder.best] if self._is_best(measured.score) else []
        if here.step == phase.settings.steps or self._converged(phase, means["loss"]):
            paths += self._leave(phase)
        self.meter.clear()
        self.save(*paths)

    def _shared_means(self) -> dict[str, float]:
        """Means of what the updates of the epoch measured, over all processes."""
        means = self.meter.means()
        shared = ranks.mean(torch.tensor(list(means.values()), dtype=torch.float64))
        return dict(zip(means, shared.tolist(), strict=True))

    def _converged(self, phase: Phase, loss: float) -> bool:
        here, settings = self.position, phase.settings
        if loss < here.lowest_loss * (1 - settings.tolerance):
            here.lowest_loss, here.stale_epochs = loss, 0
        else:
            here.stale_epochs += 1
        return settings.until == "converge" and here.stale_epochs >= settings.patience

    def _leave(self, phase: Phase) -> list[Path]:
        """Go to the next phase; returns the checkpoints to be kept of this one."""
        here = self.position
        here.phase, here.step, here.lowest_loss, here.stale_epochs = here.phase + 1, 0, math.inf, 0
        self._close_bar()
        self._close_batches()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        return [self.folder.path / name for name in self.recipe.kept(phase)]

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close_batches(self) -> None:
        """End the processes that read ahead; the next phase may draw from other streams."""
        for batches in self.batches.values():
            batches.close()

    def _is_best(self, score: float | None) -> bool:
        if not self.recipe.keeps_best or (score is not None and score >= self.position.best_score):
            return False
        self.position.best_score = self.position.best_score if score is None else score
        return True

    def _restore(self) -> None:
        path = self.folder.last
        tensors, record = self.folder.load()
        load_weights(self.model, tensors, path)
        with reading(path):
            tensors, record = upgraded(tensors, record)
            for name, optimiser in self.optimisers.items():
                stored = unprefixed(f"optimiser.{name}", tensors)
                restore_optimiser(optimiser, stored, record["optimisers"].get(name, stored))
            self._restore_batches(tensors, record)
            self.position = restored_position(record["position"])
            self.recipe.restore(record)
            self.generator.set_state(tensors["generator"])
            set_random_state(tensors, record, self.device)
        self.folder.rewind(self.position.epoch)

    def _restore_batches(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:  # of any shapes
        for name, batches in self.batches.items():
            batches.load_state_dict({**unprefixed(f"batches.{name}", tensors), "cursors": record["cursors"][name]})


def restored_position(values: dict[str, Any]) -> Position:
    """The position of a checkpoint's record; KeyError or ValueError for one that is not whole."""
    return from_dict(Position, {each.name: values[each.name] for each in dataclasses.fields(Position)}, "position")


def check_finite(loss: float, step: int) -> None:
    """Raise ValueError for a loss, after so many updates, that is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"train: loss must stay finite, got {loss} at step {step} (lower the rate)")


def told(means: Mapping[str, float]) -> str:
    """Means in words, for a progress bar."""
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())


class Meter:
    """Means of what the updates of an epoch measured."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0

    def add(self, measured: Mapping[str, Tensor | float]) -> None:
        """Take in an update's numbers by name; a tensor [] on a GPU is not waited for."""
        self._count += 1
        for name, value in measured.items():
            waits = isinstance(value, Tensor) and value.device.type != "cpu"
            number = cast(Tensor, value).double() if waits else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + number

    def means(self) -> dict[str, float]:
        return {name: float(total) / self._count for name, total in self._sums.items()}

    def clear(self) -> None:
        self._sums, self._count = {}, 0
