"""The network of the network cases: one model, its drawn structures, and the plain networks with the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import den
from den.count import count_flops, image_flops
from den_kernels import RoutingPlan

from . import peers
from .harness import DTYPES, Case, Work
from .mixes import mix_structures

TASK = den.Task("cifar100", classes=100, size=32)


@dataclass
class ElasticNetwork:
    """A Deep Elastic Network with random weights and statistics, a batch of images and a structure for each."""

    model: den.DeepElasticNetwork
    images: Tensor  # [B, 3, 32, 32] channels-last
    levels: Tensor  # int32 [B, N]

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> ElasticNetwork:
        """``case.shape`` names the backbone, ``case.mix`` how many times fewer FLOPs the structures have ("1.9x")."""
        torch.manual_seed(seed)
        model = den.create_model(case.shape, [TASK]).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
        model.to(dtype=DTYPES[case.dtype])
        images = peers.channels_last(torch.randn(case.batch, 3, TASK.size, TASK.size)).to(DTYPES[case.dtype])
        levels = draw_structures(model.estimator.level_flops, case.batch, float(case.mix.removesuffix("x")), seed)
        return cls(model, images, levels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of images and weights."""
        return self.images.dtype

    def forward(self) -> Tensor:
        """The whole way to logits [B, classes]. The selector runs; the drawn structures replace its choice."""
        self.model.select(self.images, TASK)
        plan = RoutingPlan.from_levels(self.levels, groups=self.model.levels - 1)
        return self.model.estimator(self.images, TASK, plan)

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
        stem, head = copy.deepcopy(estimator.stems[0]), copy.deepcopy(estimator.heads[0])
        return peers.DenseNetwork(stem, blocks, peers.plain_norm(estimator.norm), head).eval().to(dtype)

    def selections(self) -> list[Tensor]:
        """bool [B, M] for every block: the hidden channels each instance uses."""
        sizes = [block.conv1.out_groups for block in self.model.estimator.blocks]
        return [peers.select_levels(self.levels[:, i], size) for i, size in enumerate(sizes)]

    def bucketed(self, dtype: torch.dtype) -> peers.DenseNetwork:
        """The drawn structures, bucketed by level in plain PyTorch; in float64 the oracle."""
        dense = self.dense(dtype)
        pairs = zip(dense.blocks, self.selections(), strict=True)
        return dense.with_blocks([peers.BucketBlock(block, selection) for block, selection in pairs])

    def masked(self) -> peers.DenseNetwork:
        """The drawn structures by multiplying with masks."""
        dense = self.dense(self.dtype)
        pairs = zip(dense.blocks, self.selections(), strict=True)
        return dense.with_blocks([peers.MaskedBlock(block, selection) for block, selection in pairs])

    def work(self) -> Work:
        """FLOPs of the whole networks, the selector's on our side; traffic: maps of the blocks that run, weights."""
        image, batch = image_flops(self.model, TASK), len(self.images)
        ends = image.stem + image.head
        chosen = count_flops(self.model, self.levels).sum().item() + batch * (ends + image.selector)
        dense = batch * (ends + image.blocks)
        return Work(chosen, dense, self._traffic())

    def _traffic(self) -> float:
        """Each block reads and writes the maps of the instances that do not skip it, and reads its weights, once."""
        sizes = self.dense(self.dtype).block_input_sizes(self.images[:1])
        total = 0.0
        for i, block in enumerate(self.model.estimator.blocks):
            _, channels, height, width = sizes[i]
            written = block.conv2.out_channels * height * width / block.stride**2
            active = (self.levels[:, i] > 0).sum().item()
            weights = block.conv1.weight.numel() + block.conv2.weight.numel()
            total += active * (channels * height * width + written) + weights
        return total * self.images.element_size()
