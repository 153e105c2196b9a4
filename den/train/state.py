"""State of a run as a checkpoint holds it: position, weights, optimisers, batches, generators."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from den.support import ranks
from den.support.randomness import random_state, set_random_state
from den.support.settings import from_dict
from den.train.checkpoint import (
    load_checkpoint,
    load_weights,
    optimiser_tensors,
    prefixed,
    reading,
    restore_optimiser,
    unprefixed,
)
from den.train.formats import LAYOUT, upgraded

if TYPE_CHECKING:
    from den.train.engine import Engine


@dataclass
class Position:
    """Position of a run in its schedule."""

    phase: int = 0  # phases done
    step: int = 0  # updates done in the phase at hand
    total_steps: int = 0
    epoch: int = 0
    lowest_loss: float = math.inf  # of an epoch of the phase at hand
    stale_epochs: int = 0  # since then
    best_score: float = math.inf  # of the checkpoint "best"
    updates: dict[str, int] = field(default_factory=dict)  # of each optimiser


def state_of(engine: Engine[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of any shapes by name, and a record that JSON can hold: the state from which `restore` goes on."""
    tensors = prefixed("model", engine.model.state_dict())
    optimised: dict[str, list[str]] = {}
    cursors: dict[str, list[int]] = {}
    for name, optimiser in engine.optimisers.items():
        kept = engine.shards.whole_state(optimiser) if engine.shards else optimiser_tensors(optimiser)
        optimised[name] = sorted(kept)  # in one order, whether the run was continued or not
        tensors |= prefixed(f"optimiser.{name}", kept)
    for name, batches in engine.batches.items():
        state = batches.state_dict()
        cursors[name] = state.pop("cursors")
        tensors |= prefixed(f"batches.{name}", state)
    states, generators = random_state(engine.device)
    tensors |= {"generator": engine.generator.get_state(), **states}
    record = {
        "layout": LAYOUT,
        **engine.recipe.record(),
        "position": dataclasses.asdict(engine.position),
        "cursors": cursors,
        "optimisers": optimised,
        **generators,
    }
    return tensors, record


def restore(engine: Engine[Any]) -> None:
    """Go on from the last checkpoint of the run's folder; ValueError for one that is damaged or another run's."""
    path = engine.folder.last
    tensors, record = engine.folder.load()
    load_weights(engine.model, tensors, path)
    with reading(path):
        tensors, record = upgraded(tensors, record)
        for name, optimiser in engine.optimisers.items():
            stored = unprefixed(f"optimiser.{name}", tensors)
            restore_optimiser(optimiser, stored, record["optimisers"].get(name, stored))
        _restore_batches(engine, tensors, record)
        engine.position = restored_position(record["position"])
        engine.recipe.restore(record)
        engine.generator.set_state(tensors["generator"])
        set_random_state(tensors, record, engine.device)
    engine.folder.rewind(engine.position.epoch)


def take_over(engine: Engine[Any], path: Path) -> None:
    """Go on with the weights of another run's checkpoint, and with its batches from where they stood."""
    tensors, record = ranks.from_first(lambda: load_checkpoint(path))
    load_weights(engine.model, tensors, path)
    with reading(path):
        _restore_batches(engine, *upgraded(tensors, record))


def restored_position(values: dict[str, Any]) -> Position:
    """The position of a checkpoint's record; KeyError or ValueError for one that is not whole."""
    return from_dict(Position, {each.name: values[each.name] for each in dataclasses.fields(Position)}, "position")


def _restore_batches(engine: Engine[Any], tensors: dict[str, Tensor], record: dict[str, Any]) -> None:  # of any shapes
    for name, batches in engine.batches.items():
        batches.load_state_dict({**unprefixed(f"batches.{name}", tensors), "cursors": record["cursors"][name]})
