"""Checkpoints of earlier versions in today's layout."""

import math
from typing import Any

import torch
from torch import Tensor

from den.support.randomness import random_state

LAYOUT = 2  # of what `den.train.engine` writes; before, records had no number


def upgraded(tensors: dict[str, Tensor], record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (by name, shapes unchanged) and record of a run's checkpoint in today's layout.

    Raises KeyError or TypeError for a record that is not whole.
    """
    if record.get("layout") == LAYOUT:
        return tensors, record
    searched = "dag" in record
    record = {**record, **(_searched_position if searched else _position)(record["position"]), "optimisers": {}}
    if isinstance(record["cursors"], list):  # one stream, without a name
        record["cursors"] = {"all": record["cursors"]}
        tensors = {name.replace("batches.", "batches.all.", 1): tensor for name, tensor in tensors.items()}
    if searched:
        states, generators = random_state()  # the oldest have none: they go on from the run's seed
        tensors = {"generator": torch.Generator().get_state(), **(tensors if "python" in record else states | tensors)}
        record = record if "python" in record else {**record, **generators}
    return tensors, record


def _position(position: dict[str, Any]) -> dict[str, Any]:
    """Entries of a record: the selector's updates were counted apart."""
    return {"position": {**position, "updates": {"selector": position["selector_steps"]}}}


def _searched_position(position: dict[str, Any]) -> dict[str, Any]:
    """Entries of the record of a search: phases were stages, and no loss was remembered."""
    unknown = {"lowest_loss": math.inf, "stale_epochs": 0, "best_score": math.inf, "updates": {}}
    return {"position": {**position, "phase": position["stage"], **unknown}, "reduced": position["reduced"]}
