"""The images, the network and the optimiser of a run of `den train`, as its settings say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from den.data import ImageSet, load_set
from den.data.images import split_by_image
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.nn.own_backbones import resolved
from den.nn.selector import SelectorConfig, paper_selector
from den.nn.tasks import Task
from den.support.randomness import seeded
from den.train.config import EstimatorTraining, NetworkConfig, TrainConfig


def load_sets(config: TrainConfig) -> tuple[list[ImageSet], list[ImageSet]]:
    """A run's training sets, and the sets that its epochs are measured on, one for each task."""
    return hold_out([load_set(name, "train", config.data.root) for name in config.data.tasks], config)


def hold_out(sets: list[ImageSet], config: TrainConfig) -> tuple[list[ImageSet], list[ImageSet]]:
    """Training sets, the share that is asked for, and what epochs are measured on: a part of them, or the test sets.

    Images that several sets have are on the same side in all of them.
    """
    if config.data.share < 1:
        chosen = split_by_image(sets, 1 - config.data.share, config.seed)
        sets = [s.subset(kept) for s, (kept, _) in zip(sets, chosen, strict=True)]
    if config.data.validation == 0:
        return sets, [load_set(name, "test", config.data.root) for name in config.data.tasks]
    splits = split_by_image(sets, config.data.validation, config.seed)
    kept = [s.subset(split[0]) for s, split in zip(sets, splits, strict=True)]
    return kept, [s.subset(split[1]) for s, split in zip(sets, splits, strict=True)]


def network_settings(config: TrainConfig) -> NetworkConfig:
    """The network that a run's settings ask for.

    A selector whose structures the estimator is to begin with has heads that begin as other layers do: small ones would
    make all levels as likely, which is the uniform distribution.
    """
    if config.estimator.initial == "selector":
        return replace(config.network, selector_start="xavier")
    return config.network


def _selector(network: NetworkConfig, default: SelectorConfig) -> SelectorConfig:
    """The selector that the settings ask for; default: the small one for their blocks."""
    base = paper_selector(network.backbone) if network.selector == "paper" else default
    return replace(
        base,
        channels=network.selector_channels or base.channels,
        shared_head=network.selector_head == "shared",
        reads=network.selector_reads,
        heads=network.selector_start,
    )


def new_model(network: NetworkConfig, tasks: list[Task], seed: int, joint: bool = False) -> DeepElasticNetwork:
    """The network of `network` for `tasks`, its weights drawn with `seed`; global generators stay as they were."""
    config = ModelConfig(
        tuple(tasks),
        backbone=resolved(network.backbone),
        stages=network.stages or None,
        stem=network.stem,
        levels=network.levels,
        trunk_size=network.trunk_size,
        joint=joint,
    )
    config = replace(config, selector=_selector(network, config.chosen_selector))
    with seeded(seed):
        model = DeepElasticNetwork(config)
        if network.start == "xavier":
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
    return model


def estimator_optimiser(
    estimator: nn.Module, settings: EstimatorTraining, faster: Sequence[nn.Parameter] = (), factor: float = 1.0
) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay spares biases and norms unless `decay_all`.

    The parameters `faster` learn at `factor` times the rate of the others, without weight decay.
    """
    apart = {id(p) for p in faster}
    everything = [p for p in estimator.parameters() if id(p) not in apart]
    matrices = [p for p in everything if p.ndim > 1 or settings.decay_all]
    vectors = [p for p in everything if p.ndim <= 1 and not settings.decay_all]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": list(faster), "weight_decay": 0.0, "factor": factor},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.first.rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )
