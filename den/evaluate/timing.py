"""Time of inference with and without choosing, measured."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import Structures, decide, device_of, input_batches
from den.nn.count import count_flops, image_flops
from den.nn.estimator import Estimator
from den.nn.model import DeepElasticNetwork
from den.nn.plain import PlainNetwork
from den.support.device import wait_for


@dataclass(frozen=True)
class Timing:
    """Measured seconds per image, medians, and the FLOPs of the images that were timed."""

    plain: float  # the full structure in ordinary convolutions (`PlainNetwork`), no selector
    full: float  # the estimator at its full structure, no selector
    selected: float  # selector and estimator
    selector: float  # the selector alone
    flops_ratio: float  # FLOPs with choosing / FLOPs without: stem, blocks and head, and the selector where it runs

    @property
    def dense(self) -> float:
        """The faster way of running the full structure."""
        return min(self.plain, self.full)

    @property
    def speedup(self) -> float:
        """Time of the full structure over time with choosing: above 1 where choosing is faster."""
        return self.dense / self.selected

    @property
    def realised(self) -> float:
        """Share of the saving in FLOPs that is a saving in time: 1 where twice fewer FLOPs take half the time."""
        return self.speedup * self.flops_ratio


@torch.inference_mode()
def time_per_image(
    model: DeepElasticNetwork,
    image_set: ImageSet,
    batch_size: int = 256,
    rounds: int = 15,
    batches: int = 4,
    structures: Structures | None = None,
) -> Timing:
    """Time of inference with and without choosing, on the first batches of a set; the model in evaluation mode.

    structures: the rule that chooses, the time of which counts as the selector's; None: the model's selector. An
    estimator of another kind than `Estimator` has no plain form and is timed against its full structure alone.

    The four ways take turns, so that a change in the machine's speed meets them all. In its turn each runs all the
    batches one after the other, as in use, after an untimed one that brings its weights back into the caches. Per way:
    the median over the rounds of every batch, added up. Batches are full where the set has that many.
    """
    model.eval()
    device = device_of(model)
    name, full = image_set.name, functools.partial(model.estimator, task=image_set.name)
    choose = structures or model.select

    def selected(images: Tensor) -> Tensor:
        return model(images, name) if structures is None else model.estimator(images, name, structures(images, name))

    parts = [images for images, _ in itertools.islice(input_batches(image_set, batch_size, device), batches)]
    parts = [images for images in parts if len(images) == batch_size] or parts
    runs: dict[str, Callable[[Tensor], object]] = {
        "plain": PlainNetwork(model, name) if isinstance(model.estimator, Estimator) else full,
        "full": full,
        "selected": selected,
        "selector": lambda images: choose(images, name),
    }
    seconds = in_turns(runs, parts, rounds, device)
    count = sum(map(len, parts))
    medians = {kind: each / count for kind, each in seconds.items()}
    levels = torch.cat([decide(model, images, name, structures or "selected")[0] for images in parts])
    image = image_flops(model, name)
    ends = image.stem + image.head
    chosen = count_flops(model, levels).mean().item() + (image.selector if structures is None else 0)
    return Timing(**medians, flops_ratio=(ends + chosen) / (ends + image.blocks))


def in_turns(
    runs: dict[str, Callable[[Tensor], object]],
    parts: list[Tensor],  # [B, C, S, S] each
    rounds: int,
    device: torch.device,
) -> dict[str, float]:
    """Seconds that each of some ways takes for all parts: medians over the rounds, added up."""
    seconds: dict[str, list[list[float]]] = {kind: [[] for _ in parts] for kind in runs}
    for _ in range(rounds):
        for kind, run in runs.items():
            run(parts[-1])
            for i, images in enumerate(parts):
                wait_for(device)
                start = time.perf_counter()
                run(images)
                wait_for(device)
                seconds[kind][i].append(time.perf_counter() - start)
    return {kind: sum(map(statistics.median, each)) for kind, each in seconds.items()}
