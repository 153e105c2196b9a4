"""CUDA graphs of a network, one for each combination of tasks and batch sizes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from den.nn.task_batch import TaskBatch

MOST_GRAPHS = 32  # those that were used longest ago are given up
Run = Callable[[TaskBatch, Tensor | None, Tensor], tuple[list[Any], Tensor]]
"""Results of the parts and levels [B, N], of a batch, levels [B, N] or None for the selector's, and which instances are
none of the caller's, bool [B]."""


def bucket(size: int) -> int:
    """The least power of two that is at least `size`: `bucket(5) == 8`, `bucket(0) == 1`."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(eq=False)
class _Captured:
    graph: Any
    batch: TaskBatch  # whose images the graph reads
    levels: Tensor | None  # [B, N] that it reads
    padding: Tensor  # bool [B] that it reads
    results: list[Any]
    chosen: Tensor  # [B, N] that it writes


class Graphs:
    """Runs batches as replays of captured graphs; threads wait for each other.

    bucket: the size of the graph that runs so many instances; the others are zeros.
    """

    def __init__(self, run: Run, device: torch.device, bucket: Callable[[int], int] = bucket) -> None:
        self._run, self._device, self._bucket = run, device, bucket
        self._kept: OrderedDict[tuple, _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, batch: TaskBatch, levels: Tensor | None) -> tuple[list[Any], Tensor]:
        """Results of the parts and levels [B, N] of a batch, padded to the sizes that there is a graph for."""
        sizes = [self._bucket(size) for size in batch.sizes]
        shapes = tuple(
            (task, size, part.shape[1:]) for task, size, part in zip(batch.tasks, sizes, batch.images, strict=True)
        )
        key = (shapes, levels is None)
        with self._lock:
            captured = self._kept.get(key)
            if captured is None:
                captured = self._kept[key] = self._capture(batch, sizes, levels)
                if len(self._kept) > MOST_GRAPHS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            self._fill(captured, batch, levels)
            captured.graph.replay()
            ends = zip(captured.results, batch.sizes, strict=True)
            results = [tree_map(lambda t, n=n: t[:n].clone() if isinstance(t, Tensor) else t, own) for own, n in ends]
            parts = zip(captured.chosen.split(sizes), batch.sizes, strict=True)
            return results, torch.cat([part[:n] for part, n in parts])

    def _capture(self, batch: TaskBatch, sizes: list[int], levels: Tensor | None) -> _Captured:
        images = tuple(
            part.new_zeros(size, *part.shape[1:]).contiguous(memory_format=torch.channels_last)
            for size, part in zip(sizes, batch.images, strict=True)
        )
        own = TaskBatch(batch.tasks, images, None, "list")
        given = None if levels is None else levels.new_zeros(len(own), levels.shape[1])
        padding = torch.zeros(len(own), dtype=torch.bool, device=self._device)
        made = _Captured(torch.cuda.CUDAGraph(), own, given, padding, [], padding)
        self._fill(made, batch, levels)
        stream: Any = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries and caches are ready then
                self._run(own, given, padding)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        with torch.cuda.graph(made.graph):
            made.results, made.chosen = self._run(own, given, padding)
        return made

    def _fill(self, captured: _Captured, batch: TaskBatch, levels: Tensor | None) -> None:
        """Write a batch to where the graph reads it."""
        start = taken = 0
        for into, part in zip(captured.batch.images, batch.images, strict=True):
            n = len(part)
            into[:n].copy_(part)
            into[n:].zero_()
            captured.padding[start : start + n].fill_(False)
            captured.padding[start + n : start + len(into)].fill_(True)
            if captured.levels is not None and levels is not None:
                captured.levels[start : start + n].copy_(levels[taken : taken + n])
            start, taken = start + len(into), taken + n
