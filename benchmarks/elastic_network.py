"""The network of the network cases: one model, its drawn structures, and the plain networks with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import den
from den.nn.count import count_flops, image_flops
from den.nn.task_batch import TaskBatch, task_batch

from . import peers
from .harness import DTYPES, Case, Work
from .mixes import mix_structures

TASK = den.Task("cifar100", classes=100, size=32)
DEMO_TASKS = [den.Task("digits", classes=10, size=8, channels=1), den.Task("fashion", classes=10, size=28, channels=1)]


@dataclass
class ElasticNetwork:
    """A Deep Elastic Network with random weights and statistics, a batch of images and a structure for each."""

    model: den.DeepElasticNetwork
    images: Tensor  # [B, C, S, S] channels-last
    levels: Tensor  # int32 [B, N]
    task: den.Task = TASK

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> ElasticNetwork:
        """``case.shape`` names the backbone, or is "demo" for that of ``den demo``; ``case.mix`` as in `mixes`."""
        model, task = make_model(case, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peers.randomise_norms(model)
            images = peers.channels_last(torch.randn(case.batch, task.channels, task.size, task.size))
        model.eval().to(dtype=DTYPES[case.dtype])
        levels = mix_structures(case.mix, model.estimator.level_flops, case.batch, seed)
        return cls(model, images.to(DTYPES[case.dtype]), levels, task).to(case.device)

    def to(self, device: str) -> ElasticNetwork:
        """Copy of the problem on a device."""
        return ElasticNetwork(self.model.to(device), self.images.to(device), self.levels.to(device), self.task)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of images and weights."""
        return self.images.dtype

    def forward(self) -> Tensor:
        """The whole way to logits [B, classes], in the steps of the model's own forward. The selector runs; the drawn
        structures replace its choice."""
        batch, estimator = self.batch(), self.model.estimator
        network = estimator.one_call(batch)
        self.model.selector.choose(batch)
        return estimator.run(batch, self.chosen, network=network)

    def batch(self) -> TaskBatch:
        """The images as the model's parts take them, checked."""
        return task_batch(self.images, self.task, self.model.tasks, like=self.model.estimator.heads[0].weight)

    def select(self) -> Tensor:
        """The structures [B, N] that the selector chooses."""
        return self.model.selector.choose(self.batch())

    @cached_property
    def chosen(self) -> Tensor:
        """The drawn structures in the dtype of the selector's choice."""
        return self.levels.long()

    def dense(self, dtype: torch.dtype) -> peers.DenseNetwork:
        """The full structure as a plain network in ``dtype``, weights copied."""
        estimator = self.model.estimator
        blocks = [
            peers.PreactBlock(
                peers.plain_conv(block.conv1),
                None if block.bn1 is None else peers.plain_norm(block.bn1),
                peers.plain_conv(block.conv2),
                peers.plain_norm(block.bn2),
            )
            for block in estimator.blocks
        ]
        place = [task.name for task in self.model.tasks].index(self.task.name)
        stem, head = copy.deepcopy(estimator.stems[place]), copy.deepcopy(estimator.heads[place])
        plain = peers.DenseNetwork(stem, blocks, peers.plain_norm(estimator.norm), head)
        return plain.eval().to(self.images.device, dtype)

    def selections(self) -> list[Tensor]:
        """bool [B, M] for every block: the hidden channels each instance uses."""
        sizes = [block.conv1.out_groups for block in self.model.estimator.blocks]
        return [peers.select_levels(self.levels[:, i], size) for i, size in enumerate(sizes)]

    def with_each(self, kind: Callable[[peers.PreactBlock, Tensor], Any], dtype: torch.dtype | None = None) -> Any:
        """The drawn structures in a plain network whose blocks are made by ``kind(block, selection)``.

        selection: bool [B, M], the hidden channels of the block that each image uses.
        """
        dense = self.dense(dtype or self.dtype)
        pairs = zip(dense.blocks, self.selections(), strict=True)
        return dense.with_blocks([kind(block, selection) for block, selection in pairs])

    def bucketed(self, dtype: torch.dtype) -> peers.DenseNetwork:
        """The drawn structures, bucketed by level in plain PyTorch; in float64 the oracle."""
        return self.with_each(peers.BucketBlock, dtype)

    def masked(self) -> peers.DenseNetwork:
        """The drawn structures by multiplying with masks."""
        return self.with_each(peers.MaskedBlock)

    def work(self) -> Work:
        """FLOPs of the whole networks, the selector's on our side; traffic: maps of the blocks that run, weights."""
        image, batch = image_flops(self.model, self.task), len(self.images)
        ends = image.stem + image.head
        chosen = count_flops(self.model, self.levels).sum().item() + batch * (ends + image.selector)
        dense = batch * (ends + image.blocks)
        return Work(chosen, dense, self.traffic())

    def traffic(self) -> float:
        """Bytes that no implementation avoids.

        Each block reads and writes the maps of the instances that do not skip it, and reads its weights, once.
        """
        maps: list[int] = []  # values of an image that each block reads and writes

        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # [B, C, H, W], [B, C', H', W']
            maps.append(inputs[0][0].numel() + output[0].numel())

        blocks = self.model.estimator.blocks
        hooks = [block.register_forward_hook(record) for block in blocks]
        with torch.no_grad():
            self.model.estimator(self.images[:1], self.task)
        for hook in hooks:
            hook.remove()
        active = (self.levels > 0).sum(0).tolist()
        weights = [sum(conv.weight.numel() for conv, _ in block.layers()) for block in blocks]
        moved = sum(n * size + weight for n, size, weight in zip(active, maps, weights, strict=True))
        return float(moved * self.images.element_size())


def make_model(case: Case, seed: int) -> tuple[den.DeepElasticNetwork, den.Task]:
    """The network of a case and the task that its images are of; the global generator is left as it was."""
    if case.shape == "demo":  # imported here: the checks of a GPU do without what training needs
        from den.demo import schedule
        from den.recipes.setup import new_model
        from den.train.config import DemoConfig

        network = schedule(DemoConfig())["2. Deep Elastic Network (Algorithm 1)"].network
        wanted = case.mix.removeprefix("recorded-")
        task = next((task for task in DEMO_TASKS if task.name == wanted), DEMO_TASKS[-1])
        return new_model(network, DEMO_TASKS, seed), task
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return den.create_model(case.shape, [TASK]), TASK
