"""The phases of a search of topologies: warm-up, search, fine-tuning."""

import warnings
from dataclasses import dataclass

from den.dag.config import SEARCHING, DagTrainConfig
from den.train.config import PhaseConfig
from den.train.phases import Phase, schedule_factor


@dataclass(frozen=True)
class SearchPhase(Phase):
    """A stage of the search: warm-up, search or fine-tuning.  The weights' rate falls to 0 by a cosine."""

    name: str
    settings: PhaseConfig
    before: int  # updates that the cosine has behind it where the phase begins
    over: int  # updates within which it falls
    stream: str = "all"

    @property
    def key(self) -> tuple[str | int, ...]:
        return (self.name,)

    @property
    def title(self) -> str:
        return self.name

    @property
    def labels(self) -> dict[str, str | int]:
        return {"stage": self.name}

    @property
    def trained(self) -> dict[str, float]:
        return {"weights": self.settings.rate}

    def scale(self, step: int) -> float:
        return schedule_factor("cosine", (self.before + step) / self.over)


def search_phases(config: DagTrainConfig) -> tuple[SearchPhase, ...]:
    """Warm-up, search, fine-tuning; what searches nothing has no updates but those of fine-tuning.

    Warns where the squeeze loss can never act, because the gates begin below kappa.
    """
    training, halves = config.training, config.mode == "adashare" or config.training.search == "alternating"
    first, second = (round(share * training.steps) for share in training.shares[:2])
    if config.mode not in SEARCHING:
        first, second = 0, 0
    elif training.squeeze and training.kappa > 0.5:
        warnings.warn(
            f"training.kappa is {training.kappa} of the edges, but all gates begin at 1/2: the squeeze loss acts only"
            " where they grow; set it below 0.5",
            stacklevel=2,
        )
    both, last = first + second, training.steps - first - second
    return (
        SearchPhase("warm-up", PhaseConfig(first, training.rate), 0, both),
        SearchPhase("search", PhaseConfig(second, training.rate), first, both, "weights" if halves else "all"),
        SearchPhase("fine-tuning", PhaseConfig(last, training.fine_rate), 0, last),
    )
