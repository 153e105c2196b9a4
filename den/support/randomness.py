"""The generators that code draws from without being handed one: Python's, numpy's, torch's, and those of a device.

What this library draws comes from generators of its own. Layers of torch (dropout) and other people's code draw from
these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from den.support.device import CPU


@dataclass(frozen=True)
class SharedDraws:
    """Random numbers that are drawn for a whole batch, of which each process keeps those of its own instances.

    The stream of numbers is thereby the same whatever the number of processes.

    Attributes:
        generator: at the same state in every process.
        count: instances of the whole batch.
        rows: int64 [B], the positions of one's own among them, at least one.
    """

    generator: torch.Generator
    count: int
    rows: Tensor


Draws = torch.Generator | SharedDraws
"""What functions draw from that need numbers [B, ...] or [B * n, ...] for the B instances of a batch."""


def uniform(shape: Sequence[int], draws: Draws, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of this shape, uniform over [0, 1)."""
    return _drawn(shape, draws, lambda size, generator: torch.rand(*size, generator=generator, dtype=dtype))


def integers(high: int, shape: Sequence[int], draws: Draws) -> Tensor:
    """Whole numbers of this shape, int64, uniform over 0..high - 1."""
    return _drawn(shape, draws, lambda size, generator: torch.randint(high, tuple(size), generator=generator))


def exponential(shape: Sequence[int], draws: Draws) -> Tensor:
    """Numbers of this shape, exponential of rate 1."""
    return _drawn(shape, draws, lambda size, generator: torch.empty(*size).exponential_(generator=generator))


def _drawn(shape: Sequence[int], draws: Draws, fill: Callable[[Sequence[int], torch.Generator], Tensor]) -> Tensor:
    """Draw a tensor of this shape; of shared draws the rows of one's own, of what is drawn for the whole batch."""
    if isinstance(draws, torch.Generator):
        return fill(shape, draws)
    each, rest = shape[0] // len(draws.rows), tuple(shape[1:])
    whole = fill((draws.count * each, *rest), draws.generator)
    return whole.view(draws.count, each, *rest)[draws.rows].flatten(0, 1)


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed all generators with `seed` (0 to 2**32 - 1) inside the block; restore their states after it.

    Those of a device's kind (of all GPUs) are left alone unless `device` is of that kind: a run on the CPU neither
    starts a GPU nor moves its generators.
    """
    tensors, record = random_state(device)
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the generator of code that is not ours)
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed_all(seed)
        yield
    finally:
        set_random_state(tensors, record, device)


def random_state(device: torch.device = CPU) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of all generators, for `set_random_state`.

    Returns:
        Tensors uint8 [bytes] named "torch" and, for each device of the kind of `device`, "{kind}.0", ...; and a record
        of Python's and numpy's states that JSON can hold.
    """
    kind, key, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002
    tensors = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        states = torch.get_device_module(device).get_rng_state_all()
        tensors |= {f"{device.type}.{i}": state for i, state in enumerate(states)}
    return tensors, {"python": random.getstate(), "numpy": [kind, key.tolist(), *rest]}


def set_random_state(tensors: dict[str, Tensor], record: dict[str, Any], device: torch.device = CPU) -> None:
    """Set all generators to the states that `random_state` returned; other tensors and keys are ignored.

    Generators of devices that only one of the two machines has stay as they are.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: no state of the generators.
    """
    torch.set_rng_state(tensors["torch"])
    version, state, following = record["python"]
    random.setstate((version, tuple(state), following))
    np.random.set_state(tuple(record["numpy"]))  # noqa: NPY002
    if device.type != "cpu":
        module = torch.get_device_module(device)
        for i in range(module.device_count()):
            if (name := f"{device.type}.{i}") in tensors:
                module.set_rng_state(tensors[name], i)
