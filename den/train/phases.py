"""The phases of a run, and their learning rates."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from den.train.config import PhaseConfig, TrainConfig

Network = Literal["estimator", "selector", "both"]


class Phase(ABC):
    """A part of a run: which optimisers step, for how many updates, at which rates, on which stream of batches."""

    settings: PhaseConfig
    factor = 1.0  # of the learning rates
    stream = "all"  # of the recipe's batches

    @property
    @abstractmethod
    def key(self) -> tuple[str | int, ...]:
        """Tells the phase from the others of a run."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The phase in words, for the progress bar."""

    @property
    @abstractmethod
    def labels(self) -> dict[str, str | int]:
        """The phase in a line of metrics."""

    @property
    @abstractmethod
    def trained(self) -> dict[str, float]:
        """The optimisers that step, and their learning rates at the start."""

    def scale(self, step: int) -> float:
        """Factor of the learning rates in update `step` (from 0)."""
        return self.factor * schedule_factor(self.settings.schedule, step / self.settings.steps)

    def rate(self, step: int) -> float:
        """Learning rate of update `step` (from 0), of the first optimiser."""
        return self.settings.rate * self.scale(step)


@dataclass(frozen=True)
class NetworkPhase(Phase):
    """Training of one network, or both, in one stage (counted from 1; the estimator's finish is stage S + 1)."""

    network: Network
    stage: int
    settings: PhaseConfig
    factor: float = 1.0  # after the decays of the stages before
    selector_rate: float = 0.0  # the selector's learning rate at the start of a phase that trains both
    stream: str = "all"

    @property
    def key(self) -> tuple[str | int, ...]:
        return self.network, self.stage

    @property
    def title(self) -> str:
        return f"stage {self.stage} {self.network}"

    @property
    def labels(self) -> dict[str, str | int]:
        return {"stage": self.stage, "phase": self.network}

    @property
    def trained(self) -> dict[str, float]:
        if self.network == "both":
            return {"estimator": self.settings.rate, "selector": self.selector_rate}
        return {self.network: self.settings.rate}


def schedule_factor(schedule: str, progress: float) -> float:
    """Factor of the learning rate after the share `progress` (0..1) of a phase.

    >>> [schedule_factor("step", p) for p in (0, 0.5, 0.75)]
    [1.0, 0.1, 0.01]
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0


def decay_factors(decay: float, decay_at: tuple[int, ...], first: int, last: int) -> list[float]:
    """Factor of the rate in each of the stages first..last: `decay` for every stage of `decay_at` up to it.

    Without `decay_at` for every stage after the first.

    >>> decay_factors(0.5, (), 2, 4), decay_factors(0.5, (3,), 2, 4)
    ([1.0, 0.5, 0.25], [1.0, 0.5, 0.5])
    """
    at = decay_at or tuple(range(first + 1, last + 1))
    return [decay ** sum(decayed <= stage for decayed in at) for stage in range(first, last + 1)]


def estimator_updates(config: TrainConfig) -> int:
    """Updates that the estimator of a Deep Elastic Network gets in all its phases."""
    estimator = config.estimator
    return estimator.first.steps + (config.stages - 1) * estimator.later.steps + estimator.finish.steps


def run_phases(config: TrainConfig) -> tuple[NetworkPhase, ...]:
    """The phases of Algorithm 1 in order; those without steps are left out.  A dense run is the estimator's first.

    The compared methods have phases of their own (`den.recipes`).
    """
    estimator, selector = config.estimator, config.selector
    tuned = decay_factors(estimator.decay, estimator.decay_at, 2, config.stages)
    chosen = decay_factors(selector.decay, selector.decay_at, 1, config.stages)
    phases = [NetworkPhase("estimator", 1, estimator.first)]
    if config.mode == "den":
        for stage in range(1, config.stages + 1):
            if stage > 1:
                phases.append(NetworkPhase("estimator", stage, estimator.later, tuned[stage - 2]))
            phases.append(NetworkPhase("selector", stage, selector.phase, chosen[stage - 1]))
        phases.append(NetworkPhase("estimator", config.stages + 1, estimator.finish))
    if config.selector_only or config.estimator_only:
        kept = "selector" if config.selector_only else "estimator"
        phases = [phase for phase in phases[1:] if phase.network == kept]
    found = tuple(phase for phase in phases if phase.settings.steps > 0)
    if not found:
        raise ValueError("train: settings must leave an update to be made, got none (more stages, or a finish)")
    return found
