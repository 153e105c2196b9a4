"""Random selector (DEN paper, table 5): the estimator, its structures drawn at random for every image."""

from typing import Any

import torch
from torch import Tensor

from den.data import Batch
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.recipes.base import ComparedMethod, initial_cost
from den.support.device import sent
from den.train.config import TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective, initial_structures
from den.train.phases import NetworkPhase

HALVINGS = 60
STEEPEST = 100.0


class RandomSelector(ComparedMethod):
    """Trains the estimator on structures of equation 8; at inference each block's level is drawn by chance.

    Built on the network of a DEN run it is the paper's "DEN + rand sel": that run's estimator without its selector.
    """

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.chances = level_chances(model.estimator.level_flops.cpu().double(), config.methods.random_flops)

    def structures(self, images: Images, task: Tasks) -> Tensor:
        """Drawn anew in every call from the run's seed: a batch of as many images gets the same structures again."""
        device = self.model.estimator.level_flops.device
        count = len(images) if isinstance(images, Tensor) else sum(map(len, images))
        generator = torch.Generator(device).manual_seed(self.config.seed)
        chances = self.chances.to(device)
        drawn = torch.multinomial(chances, count * self.model.num_blocks, replacement=True, generator=generator)
        return drawn.view(count, self.model.num_blocks)

    def update_cost(self) -> float:
        return initial_cost(self.model, self.config)

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        model, tau = self.model, self.config.estimator.tau
        drawn = initial_structures(batch.count, model.num_blocks, model.levels, tau, batch.draws(engine.generator))
        return self.estimator_loss(batch, sent(drawn, engine.device))


def level_chances(flops: Tensor, share: float | None) -> Tensor:
    """Probabilities [L] of the levels, the same in every block, at which structures cost `share` of the full FLOPs.

    flops: float64 [N, L], of each block at each level.  Uniform for None, otherwise proportional to exp(a * cost), the
    distribution of the largest entropy at that mean cost; a by bisection.  ValueError for less than the lowest level
    costs.
    """
    costs = flops.sum(0) / flops[:, -1].sum()
    if share is None:
        return torch.full_like(costs, 1 / len(costs))
    if not costs[0] <= share <= 1:
        raise ValueError(f"random: methods.random_flops must be in {costs[0].item():.3g}..1 here, got {share}")
    low, high = -STEEPEST, STEEPEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        cheap = (middle * costs).softmax(0) @ costs < share
        low, high = (middle, high) if cheap else (low, middle)
    return (high * costs).softmax(0)
