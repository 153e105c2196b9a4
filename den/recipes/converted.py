"""Algorithm 1 of the paper for a converted model: the model and its selector trained in turn, in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.attached import ImageSelector
from den.nn.estimator import repeated
from den.support.progress import Progress
from den.train.objective import (
    initial_structures,
    leave_one_out_advantage,
    reinforce,
    sample_structures,
    selected_structures,
    sparsity_penalty,
)
from den_kernels import ElasticModel, level_flops, levels, recalibrate

_OP = "train_elastic"
RECALIBRATION = 20  # batches


@dataclass(frozen=True)
class ElasticTraining:
    """Settings of `train_elastic`. `den train --help` explains those of the two networks, which are the same."""

    rounds: int = 2
    """S of Algorithm 1."""
    model_steps: int = 500
    """Updates of the model in a round; 0: its weights stay."""
    selector_steps: int = 250
    batch_size: int = 64
    rate: float = 0.01
    """Of the model: SGD with Nesterov momentum, the rate falls to 0 within a round."""
    selector_rate: float = 1e-3
    weight_decay: float = 1e-4
    tau: float = 0.75
    initial_share: float = 0.3
    rho: float = 0.3
    """Weight of the sparsity term: larger means fewer FLOPs."""
    samples: int = 4
    entropy_bonus: float = 0.05
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        least = {"rounds": 1, "model_steps": 0, "selector_steps": 0, "batch_size": 2, "samples": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{_OP}: {name} must be at least {value}, got {getattr(self, name)}")


def train_elastic(
    elastic: ElasticModel,
    images: Tensor,
    labels: Tensor,
    settings: ElasticTraining | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> ElasticModel:
    """Train a converted model and its selector in turn, in place (Ahn, Kim, Oh, ICCV 2019, Algorithm 1).

    In the first round the model trains at structures of the initial distribution (equation 8), later at those of the
    selector; the selector by REINFORCE on the cross-entropy and the sparsity of the structures that it samples
    (equations 5 to 7). Then the statistics of the model's batch norms are measured for each level
    (`den_kernels.recalibrate`).

    Args:
        elastic: of `den.attach_selector`.
        images, labels: [n, C, H, W] as the model takes them, on its device, and int64 [n].
        settings: None: the default ones.
        augment: of a batch of images, to be called before each update of the model.

    Returns:
        `elastic` in evaluation mode. It holds all there is: save its `state_dict`, or an `Engine` of it. The global
        random generator is not used.

    Raises:
        ValueError: another selector, images and labels that do not fit, a loss that is not finite (lower the rate).
    """
    settings = settings or ElasticTraining()
    if not isinstance(elastic, ElasticModel) or not isinstance(elastic.selector, ImageSelector):
        raise ValueError(f"{_OP}: elastic must be of den.attach_selector, got {type(elastic).__name__}")
    if labels.ndim != 1 or len(labels) != len(images) or len(labels) < 2 or labels.is_floating_point():
        raise ValueError(f"{_OP}: labels must be integer [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    run = _Training(elastic, images, labels, settings, augment or (lambda batch: batch))
    for number in range(1, settings.rounds + 1):
        run.train_model(number)
        run.train_selector(number)
    elastic.eval()
    batches = [images[rows] for rows, _ in zip(run.batches(), range(RECALIBRATION), strict=False)]
    recalibrate(elastic.model, batches, progress=settings.progress)
    return elastic


class _Training:
    def __init__(
        self,
        elastic: ElasticModel,
        images: Tensor,  # [n, C, H, W]
        labels: Tensor,  # [n]
        settings: ElasticTraining,
        augment: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.selector = elastic.model, elastic.selector
        self.images, self.labels, self.settings, self.augment = images, labels, settings, augment
        self.generator = torch.Generator().manual_seed(settings.seed)
        table = level_flops(self.model, images[:1]).blocks
        self.fractions = (table / table[:, -1:]).float().to(images.device)
        self.lowest = torch.tensor(self.selector.lowest, device=images.device)

    def batches(self) -> Iterator[Tensor]:
        """Positions [B] of images, passes over all without end."""
        while True:
            order = torch.randperm(len(self.labels), generator=self.generator)
            yield from (rows for rows in order.split(self.settings.batch_size) if len(rows) > 1)

    def structures(self, number: int, x: Tensor) -> Tensor:
        """Structures [B, N] to train the model on, of x [B, C, H, W]."""
        N, L = self.fractions.shape
        drawn = initial_structures(len(x), N, L, self.settings.tau, self.generator).to(x.device)
        if number > 1:
            with torch.no_grad():
                chosen = selected_structures(self.selector.logits(x), self.generator)  # type: ignore[operator]
            keeps = torch.rand(len(x), 1, generator=self.generator) < self.settings.initial_share
            drawn = torch.where(keeps.to(x.device), drawn, chosen)
        return drawn.maximum(self.lowest)

    def train_model(self, number: int) -> None:
        """One phase of the model."""
        settings, steps = self.settings, self.settings.model_steps
        optimiser = torch.optim.SGD(
            self.model.parameters(), settings.rate, 0.9, weight_decay=settings.weight_decay, nesterov=True
        )
        self.model.train()
        self.selector.eval()
        for step, rows in self._steps(steps, f"round {number}: model"):
            optimiser.param_groups[0]["lr"] = settings.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            x, y = self.augment(self.images[rows]), self.labels[rows]
            with levels(self.model, self.structures(number, x)):
                self._update(optimiser, F.cross_entropy(self.model(x), y))

    def train_selector(self, number: int) -> None:
        """One phase of the selector."""
        settings, steps = self.settings, self.settings.selector_steps
        optimiser = torch.optim.Adam(self.selector.parameters(), settings.selector_rate)
        self.model.eval()
        self.selector.train()
        for step, rows in self._steps(steps, f"round {number}: selector"):
            x, y = self.images[rows], self.labels[rows]
            log_probabilities = self.selector.logits(x).log_softmax(-1)  # type: ignore[operator]
            drawn = sample_structures(log_probabilities, settings.samples, 0.0, self.generator).maximum(self.lowest)
            advantage = leave_one_out_advantage(self._costs(x, y, drawn))
            bonus = settings.entropy_bonus * (1 - step / steps)
            self._update(optimiser, reinforce(log_probabilities, drawn, advantage, bonus))

    @torch.no_grad()
    def _costs(self, x: Tensor, y: Tensor, drawn: Tensor) -> Tensor:
        """R(z; x, y) (equation 6) of structures [B, S, N]: [B, S]."""
        samples = drawn.shape[1]
        with levels(self.model, drawn.flatten(0, 1)):
            logits = self.model(repeated(x, samples))
        losses = F.cross_entropy(logits.float(), y.repeat_interleave(samples, 0), reduction="none")
        return losses.view(-1, samples) + sparsity_penalty(drawn, self.fractions, self.settings.rho)

    def _steps(self, steps: int, title: str) -> Iterator[tuple[int, Tensor]]:
        if not steps:
            return
        bar = Progress(steps, title, unit="update") if self.settings.progress else None
        try:
            for step, rows in zip(range(steps), self.batches(), strict=False):
                yield step, rows
                if bar is not None:
                    bar.update()
        finally:
            if bar is not None:
                bar.close()

    def _update(self, optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise ValueError(f"{_OP}: loss must stay finite, got {float(loss)} (lower the rate)")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
