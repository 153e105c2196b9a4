"""Operating points of an engine: which levels the images get."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from den.evaluate.operating import CLOSE, CORRECTIONS, LevelCosts, choose_weight

_OP = "Engine"


@dataclass(frozen=True, eq=False)
class Point:
    """A rule for levels: one structure for all images, or the selector's logits less a shift.

    structure: int64 [N]. shift: float32 [K, N, L], for each task (of a converted model for one).
    """

    structure: Tensor | None = None
    shift: Tensor | None = None

    def choose(self, logits: Tensor, task: int) -> Tensor:
        """Levels int64 [B, N] of the selector's logits [B, N, L]."""
        return (logits if self.shift is None else logits - self.shift[task].to(logits)).argmax(-1)


def structure_within(costs: LevelCosts, lowest: Sequence[int], limit: float) -> Tensor:
    """The structure int64 [N] of one network within a limit: one level for all, then some blocks one level higher.

    Blocks whose next level is the cheapest come first. Raises ValueError where the cheapest structure costs more.
    """
    least, (N, L) = torch.tensor(lowest), costs.levels.shape
    found = least.clone()

    def cost(structure: Tensor) -> float:
        return float(costs.of(structure[None])[0])

    if cost(found) > limit:
        raise ValueError(f"{_OP}: budget must be at least {cost(found):.4g}, the cheapest structure's, got {limit:g}")
    for level in range(L):
        if cost(wanted := torch.full((N,), level).maximum(least)) <= limit:
            found = wanted
    rows = torch.arange(N)
    steps = costs.levels[rows, (found + 1).clamp(max=L - 1)] - costs.levels[rows, found]
    for n in steps.argsort().tolist():
        raised = found.clone()
        raised[n] = min(int(found[n]) + 1, L - 1)
        if cost(raised) <= limit:
            found = raised
    return found


def shift_within(logits: Sequence[Tensor], costs: LevelCosts, limit: float) -> Tensor:
    """The shift [K, N, L] with which the structures of each task cost at most `limit` in the mean.

    logits: of images of each task [B, N, L]; -inf of levels that a block does not have, whose costs are those of its
    lowest. Raises ValueError where the cheapest structure costs more.
    """
    shifts = []
    for own in logits:
        finite = own.isfinite()
        own = torch.where(finite, own, torch.where(finite, own, torch.inf).amin() - 1)
        shifts.append(choose_weight(own, costs, limit) * costs.levels)
    return torch.stack(shifts).float()


def within_milliseconds(
    fit: Callable[[float], Point], clock: Callable[[Point], float], costs: LevelCosts, limit: float
) -> Point:
    """The point at which an image takes `limit` milliseconds: predicted by `costs`, then corrected by timing.

    fit: the point at a cost of the model. Raises ValueError where even the cheapest structure takes longer.
    """
    aim = limit
    for _ in range(CORRECTIONS + 1):
        point = fit(max(aim, costs.least))
        taken = clock(point)
        if abs(taken / limit - 1) <= CLOSE or (taken < limit and aim >= costs.most):
            return point
        if aim <= costs.least and taken > limit:
            raise ValueError(f"{_OP}: budget_ms must be at least {taken:.4g}, the cheapest structure's, got {limit:g}")
        aim = max(costs.least, aim * limit / taken)
    return point
