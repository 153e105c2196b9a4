"""The generators that code draws from without being handed one: Python's, numpy's, torch's, and those of a device.

What this library draws comes from generators of its own. Layers of torch (dropout) and other people's code draw from
these.
"""

import random
from collections.abc import Iterator, Sequence
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

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole batch's numbers, where one's own instances have `shape`."""
        return shape[0] // len(self.rows) * self.count, *shape[1:]

    def own(self, numbers: Tensor) -> Tensor:
        """Numbers [B * n, ...] of one's own instances, of those of the whole batch, [count * n, ...]."""
        return numbers.view(self.count, -1, *numbers.shape[1:])[self.rows].flatten(0, 1)


Draws = torch.Generator | SharedDraws
"""What functions draw from that need numbers [B, ...] or [B * n, ...] for the B instances of a batch."""


def uniform(shape: Sequence[int], draws: Draws, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of this shape, uniform over [0, 1)."""
    if isinstance(draws, torch.Generator):
        return torch.rand(*shape, generator=draws, dtype=dtype)
    return draws.own(torch.rand(*draws.whole(shape), generator=draws.generator, dtype=dtype))


def integers(high: int, shape: Sequence[int], draws: Draws) -> Tensor:
    """Whole numbers of this shape, int64, uniform over 0..high - 1."""
    if isinstance(draws, torch.Generator):
        return torch.randint(high, tuple(shape), generator=draws)
    return draws.own(torch.randint(high, draws.whole(shape), generator=draws.generator))


def exponential(shape: Sequence[int], draws: Draws) -> Tensor:
    """Numbers of this shape, exponential of rate 1."""
    if isinstance(draws, torch.Generator):
        return torch.empty(*shape).exponential_(generator=draws)
    return draws.own(torch.empty(*draws.whole(shape)).exponential_(generator=draws.generator))


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
