"""Operating points of a trained network: its selector shifted towards a budget at run time, without training.

This is ours; the paper trains a network for every trade-off (rho). Block i of an image x runs at

    arg max_l  logit_i(l; x) - lambda * cost_i(l)

with one lambda for each task. The cost that a block's choice has can only fall as lambda grows, whatever the costs are
(add the two inequalities that say that each choice is the best at its own lambda), so the mean cost of a set of images
is monotone in lambda and bisection finds the smallest lambda that keeps to a budget. The shift goes into the biases of
the selector's heads: an operating point is an ordinary network and costs nothing to run.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import BATCH, full_flops
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import find_task
from den.support.call_time import call_seconds, module_seconds

HALVINGS = 100
CORRECTIONS = 3
CLOSE = 0.02  # of a time that counts as met


@dataclass(frozen=True, eq=False)
class LevelCosts:
    """A linear model of what an image costs: `fixed` plus the cost of the level of each of its blocks."""

    levels: Tensor  # float64 [N, L], on the CPU
    fixed: float = 0.0

    def of(self, structures: Tensor) -> Tensor:
        """Cost of each structure: integer [B, N] -> float64 [B]."""
        return self.levels.gather(1, structures.cpu().t()).sum(0) + self.fixed

    @property
    def least(self) -> float:
        """Cost of the cheapest structure."""
        return self.levels.min(1).values.sum().item() + self.fixed

    @property
    def most(self) -> float:
        """Cost of the dearest structure."""
        return self.levels.max(1).values.sum().item() + self.fixed


def flops_costs(model: DeepElasticNetwork) -> LevelCosts:
    """FLOPs of the blocks, the full structure being 1."""
    return LevelCosts(model.estimator.level_flops.cpu().double() / full_flops(model))


@torch.inference_mode()
def measured_costs(
    model: DeepElasticNetwork, image_set: ImageSet, batch_size: int = 256, rounds: int = 9
) -> LevelCosts:
    """Milliseconds per image on the model's device: medians of every block at every level, all images at that level.

    `fixed` is what the network in use takes beyond that: stem, head, selector, and what mixing levels costs.
    """
    model.eval()
    device = next(model.parameters()).device
    images, name = image_set.inputs(slice(0, batch_size)).to(device), image_set.name
    unit = 1e3 / len(images)
    rows = []
    for level in range(model.levels):
        structures = torch.full((len(images), model.num_blocks), level, device=device)
        run = partial(model.estimator, images, name, structures)
        rows.append(module_seconds(list(model.estimator.blocks), run, device, rounds))
    blocks = LevelCosts(torch.tensor(rows, dtype=torch.float64).t() * unit)
    whole = milliseconds(model, image_set, batch_size, rounds)
    return LevelCosts(blocks.levels, max(0.0, whole - blocks.of(model.select(images, name)).mean().item()))


@torch.inference_mode()
def milliseconds(model: DeepElasticNetwork, image_set: ImageSet, batch_size: int = 256, rounds: int = 9) -> float:
    """Median time per image, selector included, on the first batch of a set."""
    device = next(model.parameters()).device
    images = image_set.inputs(slice(0, batch_size)).to(device)
    return 1e3 * call_seconds(partial(model, images, image_set.name), device, rounds) / len(images)


def chosen_levels(logits: Tensor, costs: LevelCosts, weight: float) -> Tensor:
    """arg max of `logits - weight * costs`: [B, N, L] -> int64 [B, N]."""
    return (logits.double() - weight * costs.levels.to(logits.device)).argmax(-1)


def choose_weight(logits: Tensor, costs: LevelCosts, limit: float) -> float:
    """The smallest lambda whose structures cost at most `limit` in the mean over the images of `logits` [B, N, L].

    Negative where the selector by itself costs less than the limit. The limit is met up to the step of one block of
    one image, or of all images where their logits are equal.

    Raises:
        ValueError: the cheapest structure costs more.
    """
    if limit < costs.least:
        raise ValueError(f"budget: limit must be at least {costs.least:.4g}, the cheapest structure's, got {limit:g}")
    logits = logits.cpu()
    steps = (costs.levels.unsqueeze(2) - costs.levels.unsqueeze(1)).abs()
    reach = (logits.amax(-1) - logits.amin(-1)).max().item() + 1
    furthest = reach / steps[steps > 0].min().item() if (steps > 0).any() else 0.0
    low, high = -furthest, furthest

    def fits(weight: float) -> bool:
        return costs.of(chosen_levels(logits, costs, weight)).mean().item() <= limit + 1e-9

    if fits(low):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@torch.inference_mode()
def selector_logits(model: DeepElasticNetwork, image_set: ImageSet) -> Tensor:
    """The selector's logits [n, N, L] of a set's images, on the CPU; the model in evaluation mode."""
    device, name = next(model.parameters()).device, image_set.name
    parts = (slice(start, start + BATCH) for start in range(0, len(image_set), BATCH))
    return torch.cat([model.selector_logits(image_set.inputs(part).to(device), name).cpu() for part in parts])


def steered(model: DeepElasticNetwork, costs: dict[str, LevelCosts], weights: dict[str, float]) -> DeepElasticNetwork:
    """A copy of the network whose selector prefers cheap levels by each task's lambda."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.selector.separate_heads()
        for task, weight in weights.items():
            head = copied.selector.head(find_task(task, copied.tasks))
            head.bias.sub_((weight * costs[task].levels).flatten().to(head.bias))
    return copied


def at_flops(
    model: DeepElasticNetwork, sets: Sequence[ImageSet], limit: float
) -> tuple[DeepElasticNetwork, dict[str, float]]:
    """The network at a share of the full structure's FLOPs, for every task; and the lambdas.

    sets: images of each task that the lambdas are chosen on (without labels): not the test images.

    Raises:
        ValueError: a share above 1, or below the cheapest structure's.
    """
    costs = flops_costs(model)
    if limit > 1:
        raise ValueError(f"budget: limit must be at most 1, the full structure's FLOPs, got {limit:g}")
    weights = {s.name: choose_weight(selector_logits(model, s), costs, limit) for s in sets}
    return steered(model, {s.name: costs for s in sets}, weights), weights


def at_milliseconds(
    model: DeepElasticNetwork,
    sets: Sequence[ImageSet],
    limit: float,
    *,
    measure: Callable[[DeepElasticNetwork, ImageSet], LevelCosts] = measured_costs,
    clock: Callable[[DeepElasticNetwork, ImageSet], float] = milliseconds,
) -> tuple[DeepElasticNetwork, dict[str, float]]:
    """The network at a time per image on its device, for every task; and the lambdas.

    The linear model of `measured_costs` gives a first lambda. Then the network is timed as a whole, and where it takes
    more than the limit, or less, the model's aim is corrected by that ratio, at most `CORRECTIONS` times.

    Raises:
        ValueError: a limit below what the cheapest structure takes.
    """
    point, weights = model, {}
    for image_set in sets:
        name, logits, costs = image_set.name, selector_logits(model, image_set), measure(model, image_set)
        aim = limit
        for _ in range(CORRECTIONS + 1):
            weight = choose_weight(logits, costs, aim)
            candidate = steered(point, {name: costs}, {name: weight})
            taken = clock(candidate, image_set)
            if abs(taken / limit - 1) <= CLOSE or (taken < limit and aim >= costs.most):
                break
            aim = max(costs.least, aim * limit / taken)
        point, weights[name] = candidate, weight
    return point, weights
