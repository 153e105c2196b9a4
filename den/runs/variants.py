"""A trained network at other structures than its run's own: drawn by chance, or one level for all blocks."""

import dataclasses

import torch
from torch import Tensor

from den.nn.task_batch import Images, Tasks
from den.recipes.random_selector import RandomSelector
from den.runs.trained import Run
from den.train.config import TrainConfig


def with_random_selector(run: Run, flops: float | None = None) -> Run:
    """The run's network, every block's level of every image drawn by chance: the paper's "DEN + rand sel" (table 5).

    flops: share of the full structure's FLOPs that the structures cost in the mean; None: uniform levels.

    Raises:
        ValueError: a run without a selector, a share below what the cheapest structure costs.
    """
    if run.config.mode != "den":
        raise ValueError(f"evaluate: run must have a selector to be replaced, got mode {run.config.mode!r}")
    config = dataclasses.replace(run.config, methods=dataclasses.replace(run.config.methods, random_flops=flops))
    rule = RandomSelector(run.model, config).structures
    return dataclasses.replace(run, config=_not_den(run.config), structures=rule)


def at_level(run: Run, level: int) -> Run:
    """The run's network with every image at one level in all blocks; ValueError for a level that it does not have."""
    model = run.model
    if not 0 <= level < model.levels:
        raise ValueError(f"evaluate: levels must be in 0..{model.levels - 1}, got {level} ({run.folder})")

    def structures(images: Images, task: Tasks) -> Tensor:
        count = len(images) if isinstance(images, Tensor) else sum(map(len, images))
        return torch.full((count, model.num_blocks), level, device=model.estimator.level_flops.device)

    return dataclasses.replace(run, config=_not_den(run.config), structures=structures)


def _not_den(config: TrainConfig) -> TrainConfig:
    """Settings by which the run is measured by its rule (`Run.choice`)."""
    return dataclasses.replace(config, mode="random", selector_only=False, estimator_only=False)
