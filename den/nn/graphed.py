"""A network for inference on a GPU as CUDA graphs, one for each bucket of batch sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import TaskName
from den.nn.tasks import find_task
from den_kernels.building import FoldCache

BUCKETS = (1, 8, 32, 64, 128, 256)


class _Captured(NamedTuple):
    """A graph, the images that it reads and the logits that it writes."""

    graph: Any
    images: Tensor  # [bucket, C, S, S]
    logits: Tensor  # [bucket, classes]
    levels: Tensor  # [bucket, N]


class GraphedNetwork:
    """Logits of one task by replays: selector, plan, stem, blocks and head are launched as one CUDA graph.

    A batch runs in the smallest bucket that holds it, filled up with images of zeros, and one that is larger than all
    buckets in parts. A bucket's graph is captured when it is first needed, after one ordinary call; every replay routes
    its own images. When a parameter or statistic of the network changes, all graphs are captured anew. Graphs hold
    memory: their images, logits and all maps between.

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
        self._graphs: FoldCache[dict[int, _Captured]] = FoldCache()

    @torch.no_grad()
    def __call__(self, images: Tensor, *, return_levels: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, classes] of images [B, C, S, S]; with `return_levels` also the levels [B, N] that were chosen."""
        if self.model.training:
            raise ValueError("GraphedNetwork: model must be in eval mode, got training mode")
        graphs, parts = self._graphs.of((self.model,), dict), images.split(self.buckets[-1])
        runs = [self._run(part, graphs) for part in parts]
        logits, levels = (torch.cat(pieces) if len(runs) > 1 else pieces[0] for pieces in zip(*runs, strict=True))
        return (logits, levels) if return_levels else logits

    def bucket(self, batch: int) -> int:
        """The smallest bucket that holds `batch` images; ValueError where none does."""
        found = next((bucket for bucket in self.buckets if bucket >= batch), None)
        if found is None:
            raise ValueError(f"GraphedNetwork: batch must be at most {self.buckets[-1]}, got {batch}")
        return found

    def _run(self, images: Tensor, graphs: dict[int, _Captured]) -> tuple[Tensor, Tensor]:
        batch, bucket = len(images), self.bucket(len(images))
        if bucket not in graphs:
            graphs[bucket] = self._capture(images, bucket)
        captured = graphs[bucket]
        if images.shape[1:] != captured.images.shape[1:] or images.dtype != captured.images.dtype:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(
                f"GraphedNetwork: images must be {captured.images.dtype} [B, {', '.join(map(str, self.task.shape))}],"
                f" got {got}"
            )
        captured.images[:batch].copy_(images)
        if batch < bucket:
            captured.images[batch:].zero_()
        captured.graph.replay()
        return captured.logits[:batch].clone(), captured.levels[:batch].clone()

    def _capture(self, images: Tensor, bucket: int) -> _Captured:
        """Run the network once, which folds and compiles, and record it on memory of the graph's own."""
        static = images.new_zeros((bucket, *images.shape[1:]))
        static[: len(images)].copy_(images)
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.model(static, self.task)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, levels = self.model(static, self.task, return_levels=True)
        return _Captured(graph, static, logits, levels)
