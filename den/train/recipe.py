"""Interface by which the engine asks a recipe: model, data, phases, objective and measurement of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from den.data import BatchStream, MixedTaskBatches
from den.train.phases import Phase

if TYPE_CHECKING:
    from den.train.engine import Engine


@dataclass(frozen=True)
class Measured:
    """Results on held-out images after an epoch.

    Attributes:
        line: what they add to the epoch's line of metrics.
        text: the same in words, for the progress bar.
        score: the lowest makes the checkpoint "best"; None: not comparable with other epochs, taken as the best so far.
    """

    line: dict[str, Any]
    text: str = ""
    score: float | None = None


class Recipe(ABC):
    """A way of training: what a run trains, on which batches, in which phases, and how it is measured.

    Attributes:
        model: has a `config` with `to_dict`.
        batches: streams of batches, by name.
        optimisers: by name; a parameter group's `factor` multiplies its learning rate.
        keeps_best: whether a run has the checkpoint "best".
    """

    model: nn.Module
    batches: Mapping[str, BatchStream]
    optimisers: dict[str, torch.optim.Optimizer]
    keeps_best = True

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """The phases of a run, in order."""

    @abstractmethod
    def enter(self, engine: Engine[Any], phase: Any) -> None:
        """Prepare for the batches of a phase: called before the first one, and again after every measurement."""

    @abstractmethod
    def measure(self, engine: Engine[Any], phase: Any) -> Measured:
        """Results on held-out images after an epoch of a phase."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Record of the model and of where the recipe stands, for a checkpoint; serialisable as JSON."""

    @abstractmethod
    def restore(self, record: dict[str, Any]) -> None:
        """Stand where `record` says; KeyError, TypeError or ValueError for one that is not whole."""

    def begin(self, engine: Engine[Any]) -> None:
        """Prepare a new run: called once, before its first checkpoint; does nothing unless overridden."""
        return None

    def epoch_steps(self, phase: Phase) -> int:
        """Updates of an epoch, where the settings do not say."""
        return self.batches[phase.stream].epoch_steps

    def norms_apart(self) -> Collection[nn.Module]:
        """Batch norms of which every process keeps statistics of its own, where processes share the batches."""
        return ()

    def check_pieces(self, processes: int, pieces: int) -> None:
        """Raise ValueError where a batch cannot be shared by so many processes, or computed in so many pieces."""
        if processes * pieces == 1:
            return
        if not all(isinstance(batches, MixedTaskBatches) for batches in self.batches.values()):
            raise ValueError("train: data loaders of your own must be read by one process, in whole batches")
        images = min(sum(batches.counts) for batches in self.batches.values() if isinstance(batches, MixedTaskBatches))
        if images < processes * pieces:
            raise ValueError(
                f"config: data.batch_size must be at least {processes * pieces}, an image for each of {processes}"
                f" processes and {pieces} pieces, got {images}"
            )

    def kept(self, phase: Any) -> tuple[str, ...]:
        """File names of the checkpoints that are written at the end of a phase, besides the last and the best."""
        return ()
