"""The engine of every run: phases, batches, optimisers, measurements, checkpoints; a recipe says what they are."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from den.data import Batch, BatchStream
from den.support import ranks
from den.support.progress import Progress
from den.support.randomness import seeded
from den.support.run_config import RunConfig
from den.train.checkpoint import save_checkpoint
from den.train.folder import RunFolder
from den.train.gradients import GradientMeans, share_statistics
from den.train.objective import Meter, Objective
from den.train.phases import Phase
from den.train.recipe import Recipe
from den.train.sharding import Shards
from den.train.state import Position, restore, state_of

R = TypeVar("R", bound=Recipe)


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
        autocast: makes the context of the precision that the settings ask for.
        planned: updates that the phases of the run have for each optimiser.
    """

    def __init__(self, config: RunConfig, prepare: Callable[[Any, torch.device], R], *, resume: bool = False) -> None:
        self.config: Any = config
        self.position, self.meter = Position(), Meter()
        self.device = ranks.join(config.device)
        self._processes = ranks.count()
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        mixed = config.precision == "bfloat16"
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=mixed)
        self._bar: Progress | None = None
        self._piece, self._pieces = 0, config.accumulate
        self._cut: dict[str, list[Batch]] = {}
        self._means: dict[tuple[str, ...], GradientMeans] = {}
        self._trained: Mapping[str, float] = {}  # in the phase at hand, optimisers and their rates
        self._rates: list[tuple[dict[str, Any], float, float]] = []  # groups of parameters, rates and factors of them
        with contextlib.ExitStack() as stack:
            self.folder = stack.enter_context(RunFolder(config, resume=resume))
            stack.enter_context(seeded(config.seed, self.device))
            stack.callback(self._close_bar)
            self.recipe = prepare(config, self.device)
            self.model: Any = self.recipe.model
            self.batches: Mapping[str, BatchStream] = self.recipe.batches
            self.optimisers: dict[str, torch.optim.Optimizer] = self.recipe.optimisers
            stack.callback(self._close_batches)
            self.recipe.check_pieces(self._processes, self._pieces)
            self.phases = self.recipe.phases()
            self.planned = Counter[str]()
            for phase in self.phases:
                self.planned.update(dict.fromkeys(phase.trained, phase.settings.steps))
            restore(self) if self.folder.resume else self.recipe.begin(self)
            self.shards = Shards(self.optimisers) if config.sharding == "zero2" and self._processes > 1 else None
            if self._processes > 1:
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

    def phase(self, *key: str | int) -> Iterator[Batch]:
        """Batches of the phase of this key until it ends; none if it is done already, or no part of the run.

        With `accumulate` pieces of batches, each of which draws from the generator what the whole would.  Every epoch
        is measured, logged and saved.
        """
        here, entered, epoch, first, scales = self.position, None, 0, 0, [1.0]
        while here.phase < len(self.phases):
            phase = self.phases[here.phase]
            if phase is not entered:
                if phase.key != key:
                    return
                if phase.settings.steps == 0:
                    self.save(*self._leave(phase))
                    continue
                self._enter(phase)
                entered, epoch, first = phase, self.epoch_steps, here.step
                scales = [phase.scale(step) for step in range(first, min(first + epoch, phase.settings.steps))]
            for group, rate, factor in self._rates:
                group["lr"] = rate * scales[here.step - first] * factor
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
        here, last = self.position, self._piece == self._pieces - 1
        if self.device.type == "cpu":  # elsewhere looking at every loss would wait for the device
            loss = ranks.mean(objective.loss) if self._processes > 1 else objective.loss
            if not math.isfinite(value := loss.item()):
                raise not_finite(value, here.total_steps)
        names = tuple(objective.optimisers or self._trained)
        learnt = self._backward(objective, names, last)
        for name in names if last else ():
            self.optimisers[name].step()
            here.updates[name] = here.updates.get(name, 0) + 1
        if last and self.shards is not None:
            self.shards.spread(learnt)
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

    def _backward(self, objective: Objective, names: tuple[str, ...], last: bool) -> list[nn.Parameter]:
        """Add an objective's gradients to those of the optimisers named, or begin them; the last ones are shared.

        Returns the parameters that the optimisers change.
        """
        groups = [group for name in names for group in self.optimisers[name].param_groups]
        learnt = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        if self._piece == 0:
            for parameter in learnt:
                parameter.grad = None
        if objective.backward is not None:  # of the whole batch in one process: see `Recipe.check_pieces`
            objective.backward()
            return learnt
        loss = objective.loss / self._pieces if self._pieces > 1 else objective.loss
        if not last or self._processes == 1:
            loss.backward(inputs=learnt)
            return learnt
        key = (*names, *(str(id(parameter)) for parameter in learnt))
        if key not in self._means:
            of = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self._means[key] = GradientMeans([(of.get(id(p), "of the objective"), p) for p in learnt], self.shards)
        with self._means[key].taken():
            loss.backward(inputs=learnt)
        if self.position.step % self.epoch_steps == 0:
            self._means[key].check()
        return learnt

    def save(self, *paths: Path) -> None:
        """Write the run as it stands to `paths` and to the last checkpoint."""
        tensors, record = state_of(self)

        def write() -> None:
            for path in (*paths, self.folder.last):  # last: all that was written before it is known to it
                save_checkpoint(path, tensors, record)

        ranks.from_first(write)

    def _enter(self, phase: Phase) -> None:
        """Begin a phase, or go on with it after a measurement."""
        self.recipe.enter(self, phase)
        self._trained = phase.trained
        self._rates = [
            (group, rate, group.get("factor", 1.0))
            for name, rate in phase.trained.items()
            for group in self.optimisers[name].param_groups
        ]
        if self._bar is None and self.config.progress and ranks.first():
            self._bar = Progress(phase.settings.steps, phase.title, unit="update", initial=self.position.step)

    def _end_epoch(self, phase: Phase) -> None:
        """Measure, log, decide whether the phase has ended, save."""
        here, means = self.position, self._shared_means()
        for name, mean in means.items():
            if "loss" in name and not math.isfinite(mean):
                raise not_finite(mean, here.total_steps)
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


def not_finite(loss: float, step: int) -> ValueError:
    """The error for a loss, after so many updates, that is not finite."""
    return ValueError(f"train: loss must stay finite, got {loss} at step {step} (lower the rate)")


def told(means: Mapping[str, float]) -> str:
    """Means in words, for a progress bar."""
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())
