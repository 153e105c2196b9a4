"""A table of what each block costs in an engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from den.support.device import wait_for
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
    """Median milliseconds of each module in `rounds` calls of `run`, after one that is not counted; 0 if not called."""
    started: list[float] = []
    times: list[list[float]] = [[] for _ in modules]

    def begin(*_: object) -> None:
        wait_for(device)
        started.append(time.perf_counter())

    def end(n: int) -> Callable[..., None]:
        def stop(*_: object) -> None:
            wait_for(device)
            times[n].append(1e3 * (time.perf_counter() - started.pop()))

        return stop

    hooks = []
    for n, module in enumerate(modules):
        if module is not None:
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end(n))]
    try:
        for _ in range(rounds + 1):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    medians = [statistics.median(own[1:]) if len(own) > 1 else 0.0 for own in times]
    return [None if module is None else ms for module, ms in zip(modules, medians, strict=True)]


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def mean_saved(levels: Tensor, costs: Tensor) -> tuple[list[float], list[float]]:
    """Of levels [B, N] and costs [N, L]: the mean level of each block, and the share of its cost that is saved."""
    levels = levels.cpu()
    used = costs.gather(1, levels.t()).mean(1) / costs[:, -1]
    return levels.double().mean(0).tolist(), (1 - used).tolist()
