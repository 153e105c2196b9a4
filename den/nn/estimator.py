"""The estimator f(x; z, t): the backbone whose blocks run at the levels of a structure (paper, eq. 1)."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from den.nn.blocks.residual import FoldedBlock, Shortcut
from den.nn.ends import ImageStem, Stem, features, last_norm, shared_layers
from den.nn.model_config import ModelConfig
from den.nn.modules import Modules
from den.nn.one_call import Layers, OneCall, fits, trunk_network
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den_kernels import RoutingPlan, TrunkWeights, dynamic_trunk
from den_kernels.building import FoldCache, Standing, TaskNetwork, are_watched, is_traced, may_fold, norm_affine


class Estimator(nn.Module):
    """A stem and a head per task around N elastic blocks that all tasks share.

    Convolutions start from He's initialisation (fan-out), which suits residual networks with ReLU better than the
    paper's Xavier; batch norms from weight 1; heads from Xavier.

    Attributes:
        groups: channel groups of every block in a routing plan (see `den.nn.levels`).
        most_classes: of any task.
        level_parameters: int64 [N, L], weights that each block uses at each level (batch norms and biases apart).
        level_flops: int64 [N, L], twice the multiply-adds of each block at each level, for one image.
    """

    level_parameters: Tensor
    level_flops: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shapes, backbone, levels = config.shapes, config.layout, config.levels
        _, stem, trunk_size = config.trunk
        self.tasks, self.levels, self.num_blocks = config.tasks, levels, len(shapes)
        self.lowest = shapes[0].lowest
        self.groups = levels - 1 + self.lowest
        self.most_classes = max(task.classes for task in config.tasks)
        self.stems: Modules[Stem | ImageStem] = Modules(
            Stem(task, stem, trunk_size, kernel=backbone.stem_kernel) if stem else ImageStem(task, trunk_size)
            for task in (config.tasks[:1] if config.joint else config.tasks)
        )
        self.blocks = nn.ModuleList(shape.build(levels, first=index == 0) for index, shape in enumerate(shapes))
        self.norm = last_norm(backbone, shapes[-1])
        self._trunk: FoldCache[TrunkWeights | None] = FoldCache()
        self._one_call = OneCall()
        self.shared, width = shared_layers(backbone, shapes[-1])
        self.heads: Modules[nn.Linear] = Modules(nn.Linear(width, task.classes) for task in config.tasks)
        for head in self.heads:
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)
        for name, cost in (("level_parameters", "parameters"), ("level_flops", "flops")):
            table = [[getattr(shape, cost)(width) for width in shape.widths(levels)] for shape in shapes]
            self.register_buffer(name, torch.tensor(table, dtype=torch.int64), persistent=False)

    def forward(self, images: Images, task: Tasks, levels: Tensor | RoutingPlan | None = None) -> Tensor | list[Tensor]:
        """Logits of `images`, each with its own structure.

        Args:
            images: [B, C, S, S], or a list of one such tensor per task.
            task: one task, a list per task, or tasks per instance: see `den.nn.task_batch.task_batch`.
            levels: integer [B, N] in 0..L-1, in the order of the images (of a list: one part after the other); or
                the `RoutingPlan` of such levels, as `level_plan` makes it; None: the full structure.

        Returns:
            [B, classes] of one task; a list of them for a list of images; for tasks per instance [B, most classes],
            -inf in the classes that an instance's task does not have.

        Raises:
            ValueError: images, task or levels that do not fit.
        """
        batch = task_batch(images, task, self.tasks, like=self.heads[0].weight)
        return self.run(batch, self._arranged(batch, levels))

    def run(
        self,
        batch: TaskBatch,
        levels: RoutingPlan | Tensor | None,
        stem: Tensor | None = None,
        network: TaskNetwork | None = None,
    ) -> Tensor | list[Tensor]:
        """Logits of a checked batch, as `forward` returns them; arguments as of `part_logits`."""
        return batch.restore_logits(self.part_logits(batch, levels, stem, network), self.most_classes)

    def part_logits(
        self,
        batch: TaskBatch,
        levels: RoutingPlan | Tensor | None,
        stem: Tensor | None = None,
        network: TaskNetwork | None = None,
    ) -> list[Tensor]:
        """Logits [B_k, classes] of each part of a checked batch; of a joint one of every task.

        levels: a plan of the levels, or integer [B, N] in 0..L-1, in the batch's own order; or [B, S, N], S structures
        of every image, whose logits [B_k * S, classes] follow one another: stems run once for all of them.  None: every
        block at its full width.
        stem: what `self.stem` has made of the batch, which may be written over; None: not yet made.
        network: the answer of `one_call` to the batch; None: not yet asked.
        """
        samples = levels.shape[1] if isinstance(levels, Tensor) and levels.ndim == 3 else 1
        whole = levels.ndim == 2 if isinstance(levels, Tensor) else levels is not None and levels.masks is None
        if whole and stem is None and batch.form != "joint" and not torch.is_grad_enabled():
            network = network or self.one_call(batch)
            if network is not None and levels is not None:
                own = levels.long().contiguous() if isinstance(levels, Tensor) else levels.levels.t()
                return network(batch.tasks, batch.images, own)
        plan = self.level_plan(levels.flatten(0, -2)) if isinstance(levels, Tensor) else levels
        x = self.stem(batch) if stem is None else stem
        pooled = self.trunk(x if samples == 1 else repeated(x, samples), plan)
        if batch.form == "joint":
            return [head(pooled) for head in self.heads]
        parts = pooled.split([samples * images.shape[0] for images in batch.images])
        return [self.heads[k](part) for k, part in zip(batch.tasks, parts, strict=True)]

    def one_call(self, batch: TaskBatch) -> TaskNetwork | None:
        """The estimator of a checked batch in one call; None where its layers have to be called one by one."""
        return self._one_call.network(self, batch, self._layers, self._fold, self.lowest)

    def _layers(self) -> Layers | None:
        """The layers that `_fold` folds; None where it does not."""
        blocks = [block for block in self.blocks._modules.values() if block is not None]
        if self.norm is None or self.lowest or len(self.shared) or are_watched(blocks):
            return None
        standing, ends = Standing(), (self.stems, self.heads)
        standing.keep_children(self, self.blocks, self.shared, *ends)
        standing.keep_plain(blocks)
        for block in blocks:
            if "_frozen" in block.__dict__:
                standing.keep(block, "_frozen")
        layers = [module for each in ends for module in each._modules.values() if module is not None]
        kept, _ = _kept(blocks)
        frozen = [id(block._frozen) for block in blocks if block not in kept]
        return Layers((*layers, *kept, self.norm), lambda: (*frozen, *_kept(kept)[1]), standing)

    def _fold(self) -> TaskNetwork | None:
        trunk = self._folded_trunk(True) if fits(self.stems, self.heads) else None
        if trunk is None or trunk.dtype != self.heads[0].weight.dtype:
            return None
        stems = [cast(Stem, self.stem_of(k)) for k in range(len(self.tasks))]
        return trunk_network(stems, trunk, self.heads)

    def stem_of(self, task: int) -> Stem | ImageStem:
        """The stem of the task at a position."""
        return self.stems[min(task, len(self.stems) - 1)]

    def stem(self, batch: TaskBatch) -> Tensor:
        """Feature maps [B, stem, H, W] of the images, in the batch's own order."""
        x = [self.stem_of(k)(images) for k, images in zip(batch.tasks, batch.images, strict=True)]
        return x[0] if len(x) == 1 else torch.cat(x)

    def trunk(self, x: Tensor, plan: RoutingPlan | None) -> Tensor:
        """Run all blocks and the layers up to the heads: [B, C, H, W] -> [B, features]. May write over `x`.

        At inference one call where kernels run every block, else block by block; one that no instance uses is not
        called where it is the identity.
        """
        folds = plan is not None and may_fold(self)
        if plan is not None and folds and not (x.is_cpu and plan.masks is not None):
            weights = self._folded_trunk(x.is_cpu)
            if weights is not None and weights.dtype == x.dtype:
                return self.shared(dynamic_trunk(x, plan, weights))
        routes = [None] * len(self.blocks) if plan is None else plan
        idle = plan.idle() if plan is not None and folds else [False] * len(self.blocks)
        for block, route, unused in zip(self.blocks, routes, idle, strict=True):
            if not (unused and cast(Shortcut, block.shortcut).is_identity):
                x = block(x, route, inplace=True)
        return features(x, self.norm, self.shared)

    def _folded_trunk(self, on_cpu: bool) -> TrunkWeights | None:
        """The folded weights of all blocks and of the norm behind them; None where one call does not run them."""
        norm, blocks = self.norm, [block for block in self.blocks if isinstance(block, FoldedBlock)]
        if norm is None or len(blocks) < len(self.blocks) or are_watched((*blocks, norm)):
            return None

        def fold() -> TrunkWeights | None:
            folded = tuple(block.folded() for block in blocks)
            weights = TrunkWeights(folded, *norm_affine(norm, torch.float32))
            gpu = not on_cpu and weights.dtype != torch.float64  # whose last norm is not one of float32
            return weights if weights.whole or gpu else None

        kept, settings = _kept(blocks)
        return self._trunk.of((*kept, norm), fold, *settings)

    def level_plan(self, levels: Tensor) -> RoutingPlan:
        """The routing plan of integer levels [B, N] in 0..L-1.

        Raises ValueError for a level out of range, on a CPU; elsewhere it is clamped.
        """
        if self.lowest:
            if levels.is_cpu and not is_traced() and levels.numel():
                low, high = int(levels.min()), int(levels.max())
                if low < 0 or high >= self.levels:
                    got = low if low < 0 else high
                    raise ValueError(f"estimator: levels must be in 0..{self.levels - 1}, got {got}")
            levels = levels.clamp(min=0) + self.lowest
        return RoutingPlan.from_levels(levels, groups=self.groups)

    def plan(self, batch: TaskBatch, levels: Tensor | RoutingPlan | None) -> RoutingPlan | None:
        """The routing plan of all blocks, in the batch's order; None for the full structure while training.

        levels: as of `forward`; ValueError where they do not fit the batch.
        """
        arranged = self._arranged(batch, levels)
        return self.level_plan(arranged) if isinstance(arranged, Tensor) else arranged

    def _arranged(self, batch: TaskBatch, levels: Tensor | RoutingPlan | None) -> Tensor | RoutingPlan | None:
        """Integer levels [B, N], or a plan of them, in the batch's order; arguments, None and errors as of `plan`."""
        expected, device = (batch.batch_size, self.num_blocks), self.level_flops.device
        if levels is None:
            return torch.full(expected, self.levels - 1, device=device) if may_fold(self) else None
        if isinstance(levels, RoutingPlan):
            if (levels.batch_size, len(levels)) != expected or levels.groups != self.groups:
                got = f"a plan of {levels.batch_size} instances, {len(levels)} blocks, {levels.groups} groups"
                raise self._misfit(expected, got)
            if batch.order is None:
                return levels
            if levels.masks is not None:
                return RoutingPlan.from_masks(batch.arrange(levels.masks))
            return RoutingPlan.from_levels(batch.arrange(levels.levels), groups=self.groups)
        if not isinstance(levels, Tensor):
            raise self._misfit(expected, type(levels).__name__)
        integer = not levels.is_floating_point() and levels.dtype != torch.bool
        if not integer or tuple(levels.shape) != expected or levels.device != device:
            raise self._misfit(expected, f"{levels.dtype} {list(levels.shape)} on {levels.device}")
        return batch.arrange(levels)

    def _misfit(self, expected: tuple[int, int], got: str) -> ValueError:
        return ValueError(
            f"estimator: levels must be integer [B, N] = {list(expected)} in 0..{self.levels - 1}"
            f" on the images' device, or a RoutingPlan of them with {self.groups} groups, got {got}"
        )


def _kept(blocks: Iterable[nn.Module]) -> tuple[list[nn.Module], list[object]]:
    """The blocks whose own weights are read, and what else the folded weights of all blocks depend on.

    A frozen block has its folded weights for good.
    """
    kept: list[nn.Module] = []
    settings: list[object] = []
    for block in blocks:
        frozen = getattr(block, "_frozen", None)
        if frozen is not None:
            settings.append(id(frozen))
        else:
            kept.append(block)
            settings += block.settings() if isinstance(block, FoldedBlock) else ()
    return kept, settings


def repeated(maps: Tensor, times: int) -> Tensor:
    """Each of the maps [B, C, H, W] so many times, one after the other, in their memory format: [B * times, C, H, W].

    `repeat_interleave` alone makes channels-last maps contiguous, and blocks then copy them back.
    """
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1).repeat_interleave(times, 0).permute(0, 3, 1, 2)
    return maps.repeat_interleave(times, 0)
