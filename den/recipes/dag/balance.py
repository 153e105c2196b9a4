"""Weights of the losses of several tasks: fixed, by learned uncertainties, or by how fast the losses fall."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from den.support import ranks
from den.support.device import sent

TEMPERATURE = 2.0  # of DWA, as in its paper


class Balance:
    """Weights of the tasks' losses, each beginning at that of the settings.

    fixed: these.

    uncertainty: ``exp(-s_k) w_k l_k + s_k`` with a learned s_k, 0 at first: the homoscedastic uncertainty of Kendall,
        Gal and Cipolla (CVPR 2018) in the form that all kinds of losses share.

    dwa: ``K softmax(r / 2)_k w_k l_k``, r_k the mean loss of the last epoch over that of the one before; 1 for the
        first two epochs: dynamic weight averaging (Liu, Johns and Davison, MTAN, CVPR 2019).

    Attributes:
        parameters: what is learned with the weights of the network.
    """

    def __init__(self, kind: str, weights: Sequence[float], device: torch.device) -> None:
        self.kind, count = kind, len(weights)
        self.weights = sent(torch.tensor(weights), device)
        self.log_variances = nn.Parameter(torch.zeros(count, device=device))
        self.parameters = (self.log_variances,) if kind == "uncertainty" else ()
        self.means: list[list[float]] = []  # of the last two epochs, task by task
        self._factors = torch.ones(count, device=device)
        self._sums, self._count = torch.zeros(count, dtype=torch.float64, device=device), 0

    def weighted(self, losses: Tensor) -> Tensor:
        """Losses [K] as they are added up: [K]."""
        losses = losses * self.weights
        if self.kind == "uncertainty":
            return (-self.log_variances).exp() * losses + self.log_variances
        return losses * self._factors if self.kind == "dwa" else losses

    def add(self, losses: Tensor) -> None:
        """Take in the losses [K] of an update."""
        if self.kind == "dwa":
            self._sums += losses.detach()
            self._count += 1

    def end_epoch(self) -> None:
        """Weigh the losses anew by what the epoch has shown; an epoch without updates shows nothing."""
        if self._count:
            self.means = [*self.means, (ranks.mean(self._sums) / self._count).tolist()][-2:]
            self._sums.zero_()
            self._count = 0
            self._weigh()

    def record(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON has it."""
        return {"log_variances": self.log_variances.tolist(), "means": self.means}

    def restore(self, record: dict[str, Any]) -> None:
        """Stand where `record` says."""
        with torch.no_grad():
            self.log_variances.copy_(torch.tensor(record["log_variances"]))
        self.means = [[float(mean) for mean in epoch] for epoch in record["means"]]
        self._weigh()

    def _weigh(self) -> None:
        if len(self.means) == 2:
            before, last = self.means
            factors = dwa_factors([now / max(then, 1e-12) for then, now in zip(before, last, strict=True)])
            self._factors = sent(torch.tensor(factors), self._factors.device)


def dwa_factors(ratios: Sequence[float]) -> list[float]:
    """Factors of losses that fell by these ratios; they add up to their number.

    >>> dwa_factors([0.5, 0.5])
    [1.0, 1.0]
    """
    highest = max(ratios)
    powers = [math.exp((ratio - highest) / TEMPERATURE) for ratio in ratios]
    return [len(ratios) * power / sum(powers) for power in powers]
