"""Cross-stitch networks (Misra et al., CVPR 2016): a thin copy of the network for each task, mixed after each stage.

A stage is consecutive blocks that write maps of one shape.
"""

import dataclasses
import itertools
import math
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from den.data import Batch
from den.evaluate.accuracy import full_flops
from den.nn.ends import Stem
from den.nn.estimator import Estimator
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.nn.modules import Modules
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den.recipes.base import ComparedMethod
from den.support.randomness import seeded
from den.train.config import TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective
from den.train.phases import NetworkPhase
from den_kernels import RoutingPlan


class CrossStitch(ComparedMethod):
    """Replaces the estimator by a `StitchedEstimator` of about as many parameters, and trains it in one phase.

    The initial weights come from the run's seed.
    """

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        device = model.estimator.level_flops.device
        with seeded(config.seed):
            self.stitched = StitchedEstimator(model.config, config.methods.stitch).to(device)
        model.estimator = cast(Any, self.stitched)
        self.full_flops = full_flops(model)

    def structures(self, images: Images, task: Tasks) -> None:
        return None

    def faster(self) -> dict[str, Any]:
        stitches = list(self.stitched.stitches.parameters())
        return {"faster": stitches, "factor": self.config.methods.stitch_factor}

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        return self.estimator_loss(batch, None)


class Stitch(nn.Module):
    """The maps of all copies, mixed channel by channel: x~_t = sum over s of weight[t, s] * x_s.

    weight: [K, K, C], 1 - share on the diagonal and share / (K - 1) off it to begin with.
    """

    def __init__(self, copies: int, channels: int, share: float) -> None:
        super().__init__()
        share = share if copies > 1 else 0.0
        own = torch.eye(copies)
        weight = own * (1 - share) + (1 - own) * share / max(1, copies - 1)
        self.weight = nn.Parameter(weight[:, :, None].repeat(1, 1, channels))

    def forward(self, maps: list[Tensor], t: int) -> Tensor:
        """Mixed maps x~_t of maps x_s [B, C, H, W], one for each copy."""
        weights = self.weight[t].to(maps[0].dtype)[:, None, :, None, None]  # [K, 1, C, 1, 1]
        return reduce(torch.add, (weight * x for weight, x in zip(weights, maps, strict=True)))


class TaskStems(Modules[Stem]):
    """One task's stem in each copy."""

    def flops(self) -> int:
        """Twice the multiply-adds for one image."""
        return sum(stem.flops() for stem in self)


class StitchedEstimator(nn.Module):
    """K thin copies of an estimator, one a task; an image passes through all of them and takes its task's head.

    Used as an `Estimator`: images and task in three forms, the same levels in every copy, the tables of costs those of
    all copies.  The copies are 1 / sqrt(K) as wide as the network (rounded to 4 channels), so that parameters and FLOPs
    are about its own; with one task it is the network.

    Args:
        config: the network that is cut into copies.
        share: initial weight of the other copies together.
    """

    def __init__(self, config: ModelConfig, share: float) -> None:
        super().__init__()
        copies = [DeepElasticNetwork(thinner(config)).estimator for _ in config.tasks]
        self.tasks, self.levels, self.num_blocks = config.tasks, config.levels, copies[0].num_blocks
        stages = [
            list(s) for _, s in itertools.groupby(thinner(config).shapes, lambda shape: (shape.channels, shape.size))
        ]
        self.ends = tuple(itertools.accumulate(map(len, stages)))  # the block after each stage
        stems = [TaskStems(copy.stem_of(k) for copy in copies) for k in range(len(copies))]
        self.stems: Modules[TaskStems] = Modules(stems)
        self.heads: Modules[nn.Module] = Modules(copy.heads[k] for k, copy in enumerate(copies))
        self.blocks = nn.ModuleList(block for copy in copies for block in copy.blocks)
        for copy in copies:
            copy.stems, copy.heads, copy.blocks = Modules(), Modules(), nn.ModuleList()
        self.tails: Modules[Estimator] = Modules(copies)  # what follows the blocks, up to the heads
        self.shared = nn.ModuleList()  # layers of all copies together: none
        self.stitches: Modules[Stitch] = Modules(Stitch(len(copies), stage[0].channels, share) for stage in stages)
        for name in ("level_parameters", "level_flops"):
            self.register_buffer(name, len(copies) * getattr(copies[0], name), persistent=False)

    def stem_of(self, task: int) -> TaskStems:
        """The stems of the task at a position, one of each copy."""
        return self.stems[task]

    @property
    def norm(self) -> nn.ModuleList:
        """The norms after the blocks, and the stitches."""
        return nn.ModuleList([*self.tails, *self.stitches])

    def forward(self, images: Images, task: Tasks, levels: Tensor | RoutingPlan | None = None) -> Tensor | list[Tensor]:
        """Logits; images [B, c, S, S], task and levels [B, N] as in `den.nn.estimator.Estimator`."""
        batch = task_batch(images, task, self.tasks, like=next(self.heads.parameters()))
        logits = self.part_logits(batch, self.tails[0].plan(batch, levels))
        return batch.restore_logits(logits, max(task.classes for task in self.tasks))

    def part_logits(self, batch: TaskBatch, plan: RoutingPlan | None) -> list[Tensor]:
        """Logits [B_k, classes] of each part of a checked batch."""
        copies = range(len(self.tails))
        parts = [[stem(images) for stem in self.stems[k]] for k, images in zip(batch.tasks, batch.images, strict=True)]
        maps = [torch.cat([part[s] for part in parts]) for s in copies]
        for (begin, end), stitch in zip(itertools.pairwise((0, *self.ends)), self.stitches, strict=True):
            for s in copies:
                for i in range(begin, end):
                    route = None if plan is None else plan[i]
                    maps[s] = self.blocks[s * self.num_blocks + i](maps[s], route, inplace=True)
            if end < self.num_blocks:
                maps = [stitch(maps, t) for t in copies]
        logits, split = [], [x.split(batch.sizes) for x in maps]
        for part, k in enumerate(batch.tasks):  # the last stitch: for an image's own task alone
            x = self.stitches[-1]([maps[part] for maps in split], k)
            logits.append(self.heads[k](self.tails[k].trunk(x, None)))
        return logits


def thinner(config: ModelConfig) -> ModelConfig:
    """The network at 1 / sqrt(tasks) of its width, in whole fours."""
    factor = 1 / math.sqrt(len(config.tasks))

    def thin(channels: int) -> int:
        return channels if factor == 1 or not channels else max(4, 4 * round(channels * factor / 4))

    stages = tuple((thin(channels), blocks) for channels, blocks in config.stages or ())
    return dataclasses.replace(config, stages=stages, stem=thin(config.stem or 0), selector=None)
