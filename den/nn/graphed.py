"""A network for inference on a GPU as CUDA graphs, one for each bucket of batch sizes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from den.nn.graphs import Graphs
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import TaskBatch, TaskName, find_task, task_batch
from den_kernels.building import FoldCache

BUCKETS = (1, 8, 32, 64, 128, 256)


class GraphedNetwork:
    """Logits of one task by replays: selector, plan, stem, blocks and head are launched as one CUDA graph.

    A batch runs in the smallest bucket that holds it, filled up with images of zeros at the lowest levels, and one that
    is larger than all buckets in parts. A bucket's graph is captured when it is first needed, after two ordinary calls;
    every replay routes its own images. When a parameter or statistic of the network changes, all graphs are captured
    anew. Graphs hold memory: their images, logits and all maps between.

    Args:
        model: a network in eval mode on a GPU; it goes on to work by itself.
        task: the task of the images.
        buckets: batch sizes, each at least 1.

    Raises:
        ValueError: a network elsewhere or in training mode, no buckets, an unknown task; images that do not fit.
    """

    def __init__(self, model: DeepElasticNetwork, task: TaskName, buckets: Sequence[int] = BUCKETS) -> None:
        device = model.estimator.level_flops.device
        if device.type != "cuda":
            raise ValueError(f"GraphedNetwork: model must be on a CUDA device, got {device}")
        self.buckets = tuple(sorted(set(buckets)))
        if not self.buckets or self.buckets[0] < 1:
            raise ValueError(f"GraphedNetwork: buckets must be batch sizes of at least 1, got {tuple(buckets)}")
        self.model, self.task = model, model.tasks[find_task(task, model.tasks)]
        self._device, self._graphs = device, FoldCache[Graphs]()

    @torch.no_grad()
    def __call__(self, images: Tensor, *, return_levels: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, classes] of images [B, C, S, S]; with `return_levels` also the levels [B, N] that were chosen."""
        if self.model.training:
            raise ValueError("GraphedNetwork: model must be in eval mode, got training mode")
        like = self.model.estimator.heads[0].weight
        graphs = self._graphs.of((self.model,), partial(Graphs, self._run, self._device, self.bucket))
        parts = images.split(self.buckets[-1])
        runs = [graphs(task_batch(part, self.task, self.model.tasks, like), None) for part in parts]
        logits, levels = torch.cat([own for (own,), _ in runs]), torch.cat([own for _, own in runs])
        return (logits, levels) if return_levels else logits

    def bucket(self, batch: int) -> int:
        """The smallest bucket that holds `batch` images; ValueError where none does."""
        found = next((bucket for bucket in self.buckets if bucket >= batch), None)
        if found is None:
            raise ValueError(f"GraphedNetwork: batch must be at most {self.buckets[-1]}, got {batch}")
        return found

    def _run(self, batch: TaskBatch, _: Tensor | None, padding: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of the one part, and levels [B, N]; instances of the `padding`, bool [B], run at the lowest levels."""
        estimator = self.model.estimator
        stem = estimator.stem(batch) if self.model.selector.config.reads == "stem" else None
        levels = self.model.selector.run(batch, stem).argmax(-1).masked_fill(padding[:, None], 0)
        logits = estimator.run(batch, estimator.level_plan(levels), stem)
        return list(logits), levels
