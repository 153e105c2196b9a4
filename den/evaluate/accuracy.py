"""Accuracy, FLOPs and variety of structures of each task, and static structures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from den.data import ImageSet
from den.nn.count import count_flops
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.support import ranks
from den.train.objective import entropy, parameter_fractions, sparsity_penalty

Structures = Callable[[Images, Tasks], Tensor | None]
"""A rule: images and task -> levels int64 [B, N] in 0..L-1 on the images' device; None: the full structure for all."""

Choice = Literal["selected", "full"] | Tensor | Structures
BATCH = 500


@dataclass(frozen=True, eq=False)
class TaskReport:
    """Results of one task at the structures that `evaluate` was asked for."""

    task: str
    images: int
    accuracy: float  # 0..1
    loss: float  # mean cross-entropy
    penalty: float  # mean of S(z) at rho = 1
    flops: float  # mean per image, of the blocks
    flops_ratio: float  # flops / FLOPs of the full structure
    structures: int  # different structures in use
    entropy: float  # of the selector's distribution of one image, mean over images and blocks, nats
    mean_entropy: float  # of the mean of these distributions, mean over blocks, nats
    levels: Tensor  # int64 [images, N]: the structure of every image
    usage: Tensor  # float32 [N]: mean share of each block's weights that an image uses
    probabilities: Tensor  # float32 [N, L]: mean of the selector's distributions

    @property
    def histogram(self) -> Tensor:
        """Number of images that ran each block at each level: int64 [N, L]."""
        return F.one_hot(self.levels, self.probabilities.shape[1]).sum(0)

    @property
    def common(self) -> tuple[Tensor, Tensor]:
        """Structures in use, most frequent first, and how many images use each: int64 [structures, N], [structures]."""
        found, counts = self.levels.unique(dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return found[order], counts[order]

    @property
    def variety(self) -> float:
        """Entropy in nats of the structures in use."""
        share = self.common[1].double() / self.images
        return -(share * share.log()).sum().item()

    def summary(self) -> dict[str, Any]:
        """The numbers, for a line of metrics.jsonl."""
        names = ("images", "accuracy", "loss", "penalty", "flops", "flops_ratio", "structures", "entropy")
        return {**{n: getattr(self, n) for n in (*names, "mean_entropy")}, "histogram": self.histogram.tolist()}


def equal_structures(reports: Sequence[TaskReport]) -> float:
    """Share of the images that have the same structure for every task that labels them, 0..1."""
    first, *others = [report.levels for report in reports]
    return torch.stack([(first == other).all(1) for other in others]).all(0).double().mean().item()


def evaluate(
    model: DeepElasticNetwork,
    sets: Sequence[ImageSet],
    choice: Choice = "selected",
    batch_size: int = BATCH,
    *,
    shared: bool = False,
) -> dict[str, TaskReport]:
    """Results of every set, by the name of its task.

    choice: the selector's arg max, the full structure, one structure (integer [N]) for all images, or a rule, whose
    distributions count as certain of what it gives.
    The model is in evaluation mode meanwhile and as before afterwards.  shared: the processes of a run, all of which
    call this, take the batches in turns, and get the same results.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            return {image_set.name: _evaluate_task(model, image_set, choice, batch_size, shared) for image_set in sets}
    finally:
        for module in training:
            module.training = True


def _evaluate_task(
    model: DeepElasticNetwork, image_set: ImageSet, choice: Choice, batch_size: int, shared: bool
) -> TaskReport:
    own = []
    for images, labels in input_batches(image_set, batch_size, device_of(model), shared):
        structures, chance = decide(model, images, image_set.name, choice)
        logits = model.estimator(images, image_set.name, structures)
        loss, right = F.cross_entropy(logits, labels, reduction="sum").item(), logits.argmax(1) == labels
        own.append((loss, int(right.sum()), structures.cpu(), chance.cpu()))
    losses, correct, levels, chances = zip(*(ranks.in_turns(own) if shared else own), strict=True)
    accuracy, loss = sum(correct) / len(image_set), sum(losses) / len(image_set)
    return task_report(model, image_set, torch.cat(levels), torch.cat(chances), accuracy, loss)


def task_report(
    model: DeepElasticNetwork, image_set: ImageSet, used: Tensor, chance: Tensor, accuracy: float, loss: float
) -> TaskReport:
    """The report of a set whose images ran at given structures.

    Args:
        used: int64 [images, N] on the CPU, the structure of every image.
        chance: [images, N, L] on the CPU, logarithms of the distributions that chose them.
        accuracy: of the whole set, 0..1.
        loss: mean cross-entropy of the whole set.
    """
    flops = count_flops(model, used).mean().item()
    mean, shares = chance.exp().mean(0), parameter_fractions(model).cpu()
    return TaskReport(
        task=image_set.name,
        images=len(image_set),
        accuracy=accuracy,
        loss=loss,
        penalty=sparsity_penalty(used, shares, 1.0).mean().item(),
        flops=flops,
        flops_ratio=flops / full_flops(model),
        structures=len(used.unique(dim=0)),
        entropy=entropy(chance).mean().item(),
        mean_entropy=entropy(mean.clamp_min(1e-30).log()).mean().item(),
        levels=used,
        usage=shares.gather(1, used.t()).mean(1),
        probabilities=mean,
    )


def device_of(model: DeepElasticNetwork) -> torch.device:
    """The device of a network's parameters."""
    return next(model.parameters()).device


def input_batches(
    image_set: ImageSet, batch_size: int, device: torch.device, shared: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images [B, C, S, S] and labels int64 [B] of a set, in order, on the device.

    shared: those batches whose turn it is in this process, of those that share the set.
    """
    starts = range(0, len(image_set), batch_size)
    for start in starts[ranks.rank() :: ranks.count()] if shared else starts:
        part = slice(start, start + batch_size)
        yield image_set.inputs(part).to(device), image_set.labels[part].to(device)


def decide(model: DeepElasticNetwork, images: Tensor, task: str, choice: Choice) -> tuple[Tensor, Tensor]:
    """Structures int64 [B, N], and log-probabilities [B, N, L]: the selector's, or those of a rule."""
    full = torch.full((len(images), model.num_blocks), model.levels - 1, device=images.device)
    if callable(choice) and not isinstance(choice, Tensor):
        given = choice(images, task)
        structures = full if given is None else given
        return structures, F.one_hot(structures, model.levels).float().clamp_min(1e-30).log()
    chance = model.selector_logits(images, task).log_softmax(-1)
    if isinstance(choice, Tensor):
        return choice.to(full).expand_as(full), chance
    return (full if choice == "full" else chance.argmax(-1)), chance


def full_flops(model: DeepElasticNetwork) -> float:
    """FLOPs of one image at the full structure."""
    return count_flops(model, torch.full((1, model.num_blocks), model.levels - 1)).item()


@dataclass(frozen=True, eq=False)
class StaticReport:
    """The best single structure for all images of a task."""

    structure: Tensor  # int64 [N]
    candidates: int  # structures that were tried
    report: TaskReport  # on the set asked for


def best_static(
    model: DeepElasticNetwork,
    image_set: ImageSet,
    budget: float,
    *,
    extra: Tensor | None = None,
    choose_on: ImageSet | None = None,
    candidates: int = 60,
    tolerance: float = 0.03,
    seed: int = 0,
) -> StaticReport:
    """The most accurate of many structures that cost about `budget` FLOPs, used for every image of `image_set`.

    The candidates are `static_candidates` and those of `extra` (int64 [n, N], such as the structures that the selector
    uses most) that cost at most (1 + tolerance) * budget. The best is chosen on `choose_on`, held-out images. Without
    them it is chosen on `image_set` itself, which flatters the static structure: a network that beats it even so has
    gained from choosing per image.
    """
    tried = static_candidates(model, budget, candidates, tolerance, seed)
    if extra is not None:
        affordable = extra[count_flops(model, extra).cpu() <= (1 + tolerance) * budget]
        tried = torch.cat([tried, affordable]).unique(dim=0)
    chosen_on = image_set if choose_on is None else choose_on
    reports = [evaluate(model, [chosen_on], structure)[chosen_on.name] for structure in tried]
    best = max(range(len(tried)), key=lambda i: (reports[i].accuracy, -reports[i].loss))
    report = reports[best] if choose_on is None else evaluate(model, [image_set], tried[best])[image_set.name]
    return StaticReport(tried[best], len(tried), report)


def static_candidates(model: DeepElasticNetwork, budget: float, count: int, tolerance: float, seed: int) -> Tensor:
    """Up to `count` random structures whose FLOPs lie within `tolerance` of `budget`: int64 [n, N].

    Each is drawn with level probabilities of its own, so that every budget is met by structures of many shapes. Where
    none lies within the tolerance: the nearest one.
    """
    generator = torch.Generator().manual_seed(seed)
    draws, blocks, levels = 20000, model.num_blocks, model.levels
    weights = torch.empty(draws, levels).exponential_(generator=generator)
    drawn = torch.multinomial(weights, blocks, replacement=True, generator=generator)
    distance = (count_flops(model, drawn).cpu() / budget - 1).abs() if budget > 0 else drawn.sum(1).double()
    near = (distance <= tolerance).nonzero().flatten()
    if len(near) == 0:
        near = distance.argmin().view(1)
    unique = drawn[near].unique(dim=0)
    return unique[torch.randperm(len(unique), generator=generator)[:count]]
