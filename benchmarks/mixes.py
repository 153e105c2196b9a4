"""Mixes of levels, by name: rules that draw the levels of one block, or whole structures."""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from den.train.objective import initial_structures

RECORDED = Path(__file__).resolve().parent / "recorded_levels.json"
CONSTANT = ("full", "zero", "quarter", "half")
NAMES = ("uniform", *CONSTANT, "skewed", "one-odd")


def mix_levels(mix: str, batch: int, levels: int = 4, seed: int = 0) -> Tensor:
    """Levels int32 [batch] of a named mix, shuffled.

    "uniform": equal counts (of fewer instances than levels: the middle ones first); "full", "zero", "quarter" (level 1)
    and "half" (level 2): all alike; "skewed": three of four instances at level 1, the rest uniform; "one-odd": all at
    level 1 but one, which is full. Raises ValueError for another name.
    """
    if mix not in NAMES:
        raise ValueError(f"mix_levels: mix must be one of {', '.join(NAMES)}, got {mix!r}")
    if mix in CONSTANT:
        return torch.full((batch,), {"full": levels - 1, "zero": 0, "quarter": 1, "half": 2}[mix], dtype=torch.int32)
    chosen = (torch.arange(batch) + levels // 2) % levels
    if mix == "skewed":
        chosen = torch.where(torch.arange(batch) % 4 < 3, 1, (torch.arange(batch) // 4) % levels)
    if mix == "one-odd":
        chosen = torch.ones(batch, dtype=torch.int64)
        chosen[:1] = levels - 1
    return chosen[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))].to(torch.int32)


def mix_structures(mix: str, costs: Tensor, batch: int, seed: int = 0) -> Tensor:
    """Structures int32 [batch, N] of a named mix, for blocks that cost ``costs`` [N, L].

    "1.88x": random ones with that many times fewer FLOPs; "random-blocks": every block of every image drawn evenly;
    "recorded-TASK": what a trained selector chose; "tau0.75": the paper's equation 8 with that tau, on which estimators
    are trained; else the mix of that name in every block, shuffled anew.
    """
    blocks, levels = costs.shape
    if mix.startswith("tau"):
        generator = torch.Generator().manual_seed(seed)
        return initial_structures(batch, blocks, levels, float(mix.removeprefix("tau")), generator).to(torch.int32)
    if mix.endswith("x") and mix[0].isdigit():
        return draw_structures(costs, batch, float(mix[:-1]), seed)
    if mix == "random-blocks":
        return torch.randint(levels, (batch, blocks), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    if mix.startswith("recorded-"):
        return recorded(mix.removeprefix("recorded-"), batch)
    return torch.stack([mix_levels(mix, batch, levels, seed + block) for block in range(blocks)], dim=1)


@functools.cache
def recording() -> dict:
    """The file of recorded levels: where they come from, and a string of levels for each image of each task."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def recorded(task: str, batch: int) -> Tensor:
    """Structures int32 [batch, N] that the demo's trained selector chose for the first test images of ``task``.

    Repeated from the start where the batch is larger. Raises ValueError for a task that was not recorded.
    """
    tasks = recording()["tasks"]
    if task not in tasks:
        raise ValueError(f"recorded: task must be one of {', '.join(tasks)}, got {task!r}")
    rows = torch.tensor([[int(level) for level in word] for word in tasks[task]], dtype=torch.int32)
    return rows[torch.arange(batch) % len(rows)]


def draw_structures(costs: Tensor, batch: int, ratio: float, seed: int = 0, tolerance: float = 0.002) -> Tensor:
    """Structures int32 [batch, N], level by level at random, whose mean cost is 1 / ``ratio`` of the full one's.

    Args:
        costs: [N, L], what each block costs at each level; the last level is the full one.
        ratio: full cost over mean cost, above 1.
        tolerance: relative; batches are drawn until their mean is as near as that.

    The levels are independent draws with P(l) proportional to exp(tilt * share of level l); bisection finds the tilt
    that gives the mean. Raises ValueError when no batch of 10,000 comes near enough.
    """
    costs = costs.double()
    target, shares = costs[:, -1].sum() / ratio, costs / costs[:, -1:]
    low, high = -50.0, 50.0
    for _ in range(60):
        tilt = (low + high) / 2
        cheaper = ((shares * tilt).softmax(1) * costs).sum() < target
        low, high = (tilt, high) if cheaper else (low, tilt)
    probabilities, generator = (shares * low).softmax(1), torch.Generator().manual_seed(seed)
    for _ in range(10_000):
        levels = probabilities.multinomial(batch, replacement=True, generator=generator)  # [N, B]
        mean = costs.gather(1, levels).sum(0).mean()
        if abs(mean / target - 1) <= tolerance:
            return levels.T.contiguous().to(torch.int32)
    raise ValueError(
        f"draw_structures: ratio must be within reach of {batch} structures to {tolerance:.1%}, got {ratio}"
    )
