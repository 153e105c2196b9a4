"""The estimator f(x; z, t): the backbone whose blocks run at the levels of a structure (paper, eq. 1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.backbones import Stages, block_shapes
from den.blocks import ElasticBlock
from den.folding import may_fold
from den.levels import level_widths
from den.stem import Stem
from den.task_batch import Images, TaskBatch, TaskName, Tasks, task_batch
from den.tasks import Task
from den_kernels import RoutingPlan


class Estimator(nn.Module):
    """A stem and a head per task around N elastic residual blocks that all tasks share.

    Convolutions start from He's initialisation (fan-out), which suits residual networks with ReLU better than the
    paper's Xavier; batch norms from weight 1; heads from Xavier.

    Attributes:
        level_parameters: int64 [N, L], convolution weights that each block uses at each level.
        level_flops: int64 [N, L], twice the multiply-adds of each block's convolutions at each level, for one image.
    """

    level_parameters: Tensor
    level_flops: Tensor

    def __init__(self, tasks: Sequence[Task], stages: Stages, stem: int, levels: int, trunk_size: int) -> None:
        super().__init__()
        shapes = block_shapes(stages, stem, trunk_size)
        self.tasks, self.levels, self.num_blocks = tuple(tasks), levels, len(shapes)
        self.stems = nn.ModuleList(Stem(task, stem, trunk_size) for task in tasks)
        self.blocks = nn.ModuleList(
            ElasticBlock(shape.in_channels, shape.channels, levels, stride=shape.stride, first=index == 0)
            for index, shape in enumerate(shapes)
        )
        features = shapes[-1].channels
        self.norm = nn.BatchNorm2d(features)
        self.heads = nn.ModuleList(nn.Linear(features, task.classes) for task in tasks)
        for head in self.heads:
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)
        widths = [level_widths(shape.channels, levels) for shape in shapes]
        for name, cost in (("level_parameters", "parameters"), ("level_flops", "flops")):
            table = [[getattr(shape, cost)(w) for w in row] for shape, row in zip(shapes, widths, strict=True)]
            self.register_buffer(name, torch.tensor(table, dtype=torch.int64), persistent=False)

    def forward(self, images: Images, task: Tasks, levels: Tensor | RoutingPlan | None = None) -> Tensor | list[Tensor]:
        """Logits of ``images``, each with its own structure.

        Args:
            images, task: one task, a list per task, or tasks per instance: see :func:`den.task_batch.task_batch`.
            levels: integer [B, N] in 0..L-1, in the order of the images (of a list: one part after the other); or
                the :class:`RoutingPlan` of such levels; None: the full structure.

        Returns:
            [B, classes] of one task; a list of them for a list of images; for tasks per instance [B, most classes],
            -inf in the classes that an instance's task does not have.

        Raises:
            ValueError: images, task or levels that do not fit.
        """
        batch = task_batch(images, task, self.tasks, like=self.heads[0].weight)
        return self.run(batch, self.plan(batch, levels))

    def run(self, batch: TaskBatch, plan: RoutingPlan | None) -> Tensor | list[Tensor]:
        """Logits of a checked batch; ``plan`` is in the batch's own order (None: plain full blocks)."""
        return batch.restore_logits(
            self.classify(batch.tasks, batch.sizes, self.trunk(self.stem(batch), plan)),
            max(task.classes for task in self.tasks),
        )

    def sampled(self, images: Sequence[Tensor], tasks: Sequence[TaskName], structures: Tensor) -> list[Tensor]:
        """Logits [B_k * S, classes] of each part under S structures of every image; stems run once per image.

        structures: integer [B, S, N], B images one part after the other. The S rows of an image follow one another.
        """
        batch, samples = task_batch(images, tasks, self.tasks, like=self.heads[0].weight), structures.shape[1]
        plan = RoutingPlan.from_levels(structures.flatten(0, 1), groups=self.levels - 1)
        pooled = self.trunk(self.stem(batch).repeat_interleave(samples, 0), plan)
        return self.classify(batch.tasks, [size * samples for size in batch.sizes], pooled)

    def stem(self, batch: TaskBatch) -> Tensor:
        """Feature maps [B, stem, H, W] of the images, in the batch's own order."""
        x = [self.stems[k](images) for k, images in zip(batch.tasks, batch.images, strict=True)]
        return x[0] if len(x) == 1 else torch.cat(x)

    def trunk(self, x: Tensor, plan: RoutingPlan | None) -> Tensor:
        """All blocks, the last norm and pooling: [B, features]. May write over ``x``."""
        for index, block in enumerate(self.blocks):
            x = block(x, None if plan is None else plan[index], inplace=True)
        return F.relu(self.norm(x)).mean((2, 3))

    def classify(self, tasks: Sequence[int], sizes: list[int], pooled: Tensor) -> list[Tensor]:
        """Logits [B_k, classes] of each part by its task's head."""
        return [self.heads[k](part) for k, part in zip(tasks, pooled.split(sizes), strict=True)]

    def plan(self, batch: TaskBatch, levels: Tensor | RoutingPlan | None) -> RoutingPlan | None:
        """The routing plan of all blocks, in the batch's order; None for the full structure while training."""
        expected, groups = (len(batch), self.num_blocks), self.levels - 1
        device = self.level_flops.device
        if levels is None:
            if not may_fold(self):
                return None
            return RoutingPlan.from_levels(torch.full(expected, groups, device=device), groups=groups)
        if isinstance(levels, RoutingPlan):
            self._check((levels.batch_size, len(levels)) == expected and levels.groups == groups, expected, levels)
            if batch.order is None:
                return levels
            if levels.masks is not None:
                return RoutingPlan.from_masks(batch.arrange(levels.masks))
            return RoutingPlan.from_levels(batch.arrange(levels.levels), groups=groups)
        integer = isinstance(levels, Tensor) and not levels.is_floating_point() and levels.dtype != torch.bool
        self._check(integer and tuple(levels.shape) == expected and levels.device == device, expected, levels)
        return RoutingPlan.from_levels(batch.arrange(levels), groups=groups)

    def _check(self, fits: bool, expected: tuple[int, int], levels: Tensor | RoutingPlan) -> None:
        if fits:
            return
        if isinstance(levels, RoutingPlan):
            got = f"a plan of {levels.batch_size} instances, {len(levels)} blocks, {levels.groups} groups"
        elif isinstance(levels, Tensor):
            got = f"{levels.dtype} {list(levels.shape)} on {levels.device}"
        else:
            got = type(levels).__name__
        raise ValueError(
            f"estimator: levels must be integer [B, N] = {list(expected)} in 0..{self.levels - 1}"
            f" on the images' device, or a RoutingPlan of them with {self.levels - 1} groups, got {got}"
        )
