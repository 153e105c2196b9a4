"""A table of what each block costs in an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from den.support.call_time import module_seconds
from den.support.tables import markdown_table


@dataclass(frozen=True)
class Profile:
    """The means of the images of a batch, block by block.

    level: of the images. saved: share of the block's FLOPs that were not computed. milliseconds: of the batch; None
    where the block is no module that can be timed.
    """

    blocks: tuple[str, ...]
    level: tuple[float, ...]
    saved: tuple[float, ...]
    milliseconds: tuple[float | None, ...]
    total: float  # milliseconds of the batch, all of it
    flops: float  # share of the whole structure's
    images: int

    def __str__(self) -> str:
        rows = []
        for name, level, saved, ms in zip(self.blocks, self.level, self.saved, self.milliseconds, strict=True):
            rows.append([name, f"{level:.2f}", f"{saved:.0%}", "-" if ms is None else f"{ms:.3f}"])
        rows.append([f"all, {self.images} images", "", f"{1 - self.flops:.0%}", f"{self.total:.3f}"])
        return markdown_table(["block", "mean level", "FLOPs saved", "ms"], rows)


def block_milliseconds(
    modules: Sequence[nn.Module | None], run: Callable[[], object], device: torch.device, rounds: int
) -> list[float | None]:
    """Median milliseconds of each module in `rounds` calls of `run`, None for those that are None."""
    found = iter(module_seconds([module for module in modules if module is not None], run, device, rounds))
    return [None if module is None else 1e3 * next(found) for module in modules]


def mean_saved(levels: Tensor, costs: Tensor) -> tuple[list[float], list[float]]:
    """The mean level of each block, and the saved share of its cost, for levels [B, N] and costs [N, L]."""
    levels = levels.cpu()
    used = costs.gather(1, levels.t()).mean(1) / costs[:, -1]
    return levels.double().mean(0).tolist(), (1 - used).tolist()
