"""The objective of the paper and its gradient for the selector (section 3; equation numbers are the paper's).

Structures are int64 [..., N], one level per block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.model import DeepElasticNetwork
from den.support import ranks
from den.support.device import sent
from den.support.randomness import Draws, exponential, integers, uniform

if TYPE_CHECKING:
    from den.data import Batch  # with what reads pictures, which the objective does not need

STEERING = 32.0  # most that `steered_rho` multiplies or divides by


def initial_structures(count: int, blocks: int, levels: int, tau: float, generator: Draws) -> Tensor:
    """`count` structures of the initial distribution (equation 8): int64 [count, blocks].

    The full structure with probability tau (plus its share of the rest), otherwise uniform over all levels**blocks.
    """
    anything = integers(levels, (count, blocks), generator)
    full = uniform((count, 1), generator) < tau
    return torch.where(full, levels - 1, anything)


def selected_structures(logits: Tensor, generator: Draws | None) -> Tensor:
    """Structures int64 [B, N] of logits [B, N, L]: drawn from them, or without a generator the likeliest."""
    if generator is None:
        return logits.argmax(-1)
    return sample_structures(logits.log_softmax(-1), 1, 0.0, generator)[:, 0]


def sample_structures(log_probabilities: Tensor, samples: int, epsilon: float, generator: Draws) -> Tensor:
    """`samples` structures per instance of log_probabilities [B, N, L]: int64 [B, samples, N].

    Each is, with probability epsilon, uniform over all structures instead (epsilon-greedy exploration).
    """
    (count, blocks, levels), device = log_probabilities.shape, log_probabilities.device
    chances = log_probabilities.detach().float().exp().view(-1, levels)
    drawn = draw_levels(chances, samples, generator).view(count, blocks, samples).transpose(1, 2)
    anything = integers(levels, (count, samples, blocks), generator)
    explores = uniform((count, samples, 1), generator) < epsilon
    return torch.where(sent(explores, device), sent(anything, device), drawn)


def draw_levels(chances: Tensor, samples: int, generator: Draws) -> Tensor:
    """Levels drawn from distributions [R, L], with replacement: int64 [R, samples], on their device.

    Equivalent to ``torch.multinomial(chances, samples, replacement=True, generator=generator)`` on the CPU, to the bit,
    but for distributions on a GPU too, whose numbers come from a generator of the CPU and are not waited for.
    """
    if samples == 1:
        noise = exponential(chances.shape, generator)
        return (chances / sent(noise, chances.device)).argmax(-1, keepdim=True)
    drawn = sent(uniform((len(chances), samples), generator, torch.float64), chances.device)
    bounds = list(accumulate(chances.unbind(1)))  # one after the other: in the order that multinomial adds
    inner = torch.stack(bounds[:-1], 1) / bounds[-1].unsqueeze(1)  # [R, L - 1]
    return (drawn.unsqueeze(2) > inner.unsqueeze(1)).sum(-1)


def structure_log_probability(log_probabilities: Tensor, structures: Tensor) -> Tensor:
    """log P(z | x) (equation 3) of structures [B, S, N] under log_probabilities [B, N, L]: [B, S].

    The sum of the blocks' logarithms; the logarithm of their product would underflow.
    """
    return log_probabilities.gather(2, structures.transpose(1, 2)).sum(1)


def steered_rho(rho: float, costs: Tensor, budget: float) -> Tensor:
    """rho for tasks that cost `costs` [K] and are to cost `budget`: from rho / 32, 10 % below, to 32 rho, 10 % above.

    It depends on the present cost alone: a weight that adds up past misses is still wrong when the cost is right.

    >>> steered_rho(1.0, torch.tensor([0.1, 0.5, 1.0]), 0.5).tolist()
    [0.03125, 1.0, 32.0]
    """
    return rho * STEERING ** (10 * (costs - budget) / budget).clamp(-1, 1)


def parameter_fractions(model: DeepElasticNetwork) -> Tensor:
    """`d_i(l)` of the paper's eq. 5: float32 [N, L], the share of block i's weights that level l uses."""
    table = model.estimator.level_parameters
    return table.float() / table[:, -1:]


def sparsity_penalty(structures: Tensor, fractions: Tensor, rho: float | Tensor, kind: str = "squared") -> Tensor:
    """S(z) = rho * (mean over blocks of d_i(l_i))^2 (equation 5) of structures [..., N]: [...].

    rho: one number, or [...].
    kind: squared, or l1 without the square.
    fractions: [N, L], d_i(l), the share of block i's parameters that level l uses (`parameter_fractions`).
    """
    blocks = torch.arange(len(fractions), device=structures.device)
    mean = fractions[blocks, structures].mean(-1)
    return rho * (mean if kind == "l1" else mean.square())


def entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy in nats of distributions [..., L]: [...]."""
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def instance_losses(logits: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Cross-entropy of every instance of a mixed-task batch, in the order of the batch: [B]."""
    return torch.cat([F.cross_entropy(p.float(), y, reduction="none") for p, y in zip(logits, labels, strict=True)])


@torch.no_grad()
def structure_costs(
    model: DeepElasticNetwork, batch: Batch, structures: Tensor, rho: float | Tensor, penalty: str = "squared"
) -> Tensor:
    """R(z; x, y, t) = L(f(x; z, t), y) + S(z) (equation 6) of structures [B, S, N], rho a number or [B, 1]: [B, S].

    All samples of all images run through the blocks as one batch of B * S instances; the estimator must be in
    evaluation mode.  An image of several labels costs the mean of their losses.
    """
    samples = structures.shape[1]
    labels = [part.repeat_interleave(samples, 0) for part in batch.labels]
    losses = instance_losses(model.estimator.part_logits(batch.for_network(model.positions), structures), labels)
    if batch.joint:
        losses = losses.view(len(labels), -1).mean(0)
    return losses.view(-1, samples) + sparsity_penalty(structures, parameter_fractions(model), rho, penalty)


def leave_one_out_advantage(costs: Tensor) -> Tensor:
    """Costs [B, S] minus the mean cost of the other samples of the same image: [B, S]; S >= 2."""
    samples = costs.shape[1]
    if samples < 2:
        raise ValueError(f"leave_one_out_advantage: costs must be of at least 2 samples per image, got {samples}")
    return (costs - costs.mean(1, keepdim=True)) * (samples / (samples - 1))


class RunningBaseline:
    """A running mean of the cost of every task, as the baseline of REINFORCE; on a GPU no mean is waited for."""

    def __init__(self, tasks: tuple[str, ...], momentum: float = 0.95) -> None:
        self.means: dict[str, Tensor | float | None] = dict.fromkeys(tasks)
        self.momentum = momentum

    def advantage(self, costs: Tensor, batch: Batch) -> Tensor:
        """Costs [B, S] minus the running mean of their task, which then takes in the mean of these: [B, S]."""
        split = costs.split([len(labels) for _, _, labels in batch.parts])
        means = ranks.mean(torch.stack([batch.mean(part, k).double() for k, part in enumerate(split)]))
        parts = []
        for (task, _, _), part, now in zip(batch.parts, split, means, strict=True):
            seen = self.means[task]
            parts.append(part - (now if seen is None else seen))
            self.means[task] = now if seen is None else self.momentum * seen + (1 - self.momentum) * now
        return torch.cat(parts)

    def record(self) -> dict[str, float | None]:
        """The means, as JSON has them."""
        return {task: None if mean is None else float(mean) for task, mean in self.means.items()}

    def restore(self, record: dict[str, float | None]) -> None:
        """Inverse of `record`; KeyError where a task is missing."""
        self.means = {task: record[task] for task in self.means}


@dataclass(frozen=True)
class Objective:
    """Loss that an update minimises, and means of its batch.

    Where processes share a batch, or it is computed in pieces, the mean of their losses and numbers is that of the
    whole batch: see `Batch.mean`.

    Attributes:
        loss: [], differentiable.
        measured: means over the batch, by name; None: a part of an update that another objective completes.
        optimisers: those that step; empty: those of the phase.
        backward: runs the backward pass; None: that of `loss`.
    """

    loss: Tensor
    measured: Mapping[str, Tensor | float] | None
    optimisers: tuple[str, ...] = ()
    backward: Callable[[], None] | None = None


class Meter:
    """Means of what the updates of an epoch measured."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0

    def add(self, measured: Mapping[str, Tensor | float]) -> None:
        """Take in an update's numbers by name; a tensor [] on a GPU is not waited for."""
        self._count += 1
        for name, value in measured.items():
            waits = isinstance(value, Tensor) and value.device.type != "cpu"
            number = cast(Tensor, value).double() if waits else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + number

    def means(self) -> dict[str, float]:
        return {name: float(total) / self._count for name, total in self._sums.items()}

    def clear(self) -> None:
        self._sums, self._count = {}, 0


def reinforce(
    log_probabilities: Tensor,
    structures: Tensor,
    advantage: Tensor,
    entropy_bonus: float,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor:
    """Loss with the gradient of equation 7, sum over z of A(z) grad log P(z | x) / |Z|, mean over B, less the bonus's.

    log_probabilities [B, N, L], structures [B, S, N], advantage [B, S]: the costs minus a baseline that does not depend
    on the sample.  The bonus rewards the entropy, summed over the blocks of a structure as log P is.  mean: over B, of
    values [B, ...].
    """
    likelihood = structure_log_probability(log_probabilities, structures)
    variety = entropy(log_probabilities).sum(1)
    return mean(advantage * likelihood) - entropy_bonus * mean(variety)
