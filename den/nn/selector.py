"""The selector g(x): a small network that gives each block a probability distribution over levels (paper, eq. 2)."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks import BlockShape
from den.nn.ends import KERNEL, ConvNormReLU, FeatureNorm, Stem
from den.nn.modules import Modules
from den.nn.one_call import Layers, OneCall, conv_network, fits
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den.nn.tasks import Task
from den_kernels import DynamicBatchNorm2d
from den_kernels.building import Standing, TaskNetwork

BUDGET = 0.04  # of the estimator's block FLOPs, for the default


@dataclass(frozen=True)
class SelectorConfig:
    """The selector's layers: a stem, convolutions that halve the map, and a head, for tasks each or shared.

    Args:
        channels: of the stem and of each convolution after it. Plain ones halve the map each, the stem the trunk's too;
            of residual ones the stem and the first block keep the trunk's map, and each block after it halves it.
        residual: blocks of two convolutions and a shortcut, as the paper's, in place of plain convolutions.
        shared_head: one norm and head for all tasks, as in the authors' code, in place of one each.
        reads: the images, through stems of its own; or what the estimator's stems make of them, so that the stem is
            computed once (it is not trained by the selector).
        heads: how they begin. near-uniform: so small that every level is as likely; xavier: as any layer of the paper.

    Raises:
        ValueError: no channels, a number below 1, or a word that is none of these.
    """

    channels: tuple[int, ...]
    residual: bool = False
    shared_head: bool = False
    reads: Literal["images", "stem"] = "images"
    heads: Literal["near-uniform", "xavier"] = "near-uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or not all(isinstance(c, int) and c >= 1 for c in self.channels):
            raise ValueError(f"SelectorConfig: channels must be whole numbers of at least 1, got {self.channels}")
        for name, words in (("reads", ("images", "stem")), ("heads", ("near-uniform", "xavier"))):
            if getattr(self, name) not in words:
                raise ValueError(f"SelectorConfig: {name} must be {' or '.join(words)}, got {getattr(self, name)!r}")

    def sizes(self, trunk_size: int) -> tuple[int, ...]:
        """Side of the stem's map and of each convolution's or block's after it, rounded up where it is halved."""
        halved = tuple(-(-trunk_size // 2**index) for index in range(len(self.channels) + 1))
        if self.residual:
            return (trunk_size, *halved[:-1])
        return halved if self.reads == "stem" else halved[1:]

    def widths(self, stem: int = 0) -> tuple[int, ...]:
        """Channels of the stem and of each convolution or block after it; `stem`: of the estimator's, where it reads
        them."""
        if self.reads == "stem":
            return (stem, *self.channels)
        return (self.channels[0], *self.channels) if self.residual else self.channels

    def flops(self, image_channels: int, trunk_size: int) -> int:
        """FLOPs of the convolutions for one image, with a stem of its own: twice the multiply-adds."""
        sizes, widths = self.sizes(trunk_size), self.widths()
        total = 2 * KERNEL**2 * image_channels * widths[0] * sizes[0] ** 2
        for (before, channels), size in zip(itertools.pairwise(widths), sizes[1:], strict=True):
            inner = 9 * channels * channels if self.residual else 0
            total += 2 * (9 * before * channels + inner) * size**2
        return total


# Channels at which a residual selector comes closest to the parameters and FLOPs that the paper prints for its own.
PAPER_CHANNELS = {
    "wrn": (34, 68, 136),
    "resnet": (35, 70, 140, 280),
    "resnext": (111, 222, 444),
    "vgg": (116, 232, 464),
    "simpleconvnet": (35, 70, 140),
}


def paper_selector(backbone: str) -> SelectorConfig:
    """The paper's selector for a family of backbones, as far as it tells of it: residual, its size, one shared head.

    Raises:
        ValueError: a backbone that the paper does not have.
    """
    family = next(
        (name for name in ("resnext", "simpleconvnet", "wrn", "resnet", "vgg") if backbone.startswith(name)), ""
    )
    if not family:
        raise ValueError(f"selector: backbone must be one of the paper's to have its selector, got {backbone!r}")
    return SelectorConfig(PAPER_CHANNELS[family], residual=True, shared_head=True, heads="xavier")


def default_selector(
    tasks: Sequence[Task], shapes: Sequence[BlockShape], trunk_size: int | None = None
) -> SelectorConfig:
    """A selector for an estimator: few and wide convolutions, as wide as its blocks, within 4 % of their FLOPs.

    Starts from (C, 2C, 2C), C being the channels of the first block, and narrows C in steps of 8 until it fits (C = 8
    at the least). WRN-32-4 gets (64, 128, 128): 0.9 % of its FLOPs; the paper's selector has 5 %. `trunk_size` is the
    side of the map that its first convolution halves; None: what the first block reads.
    """
    budget = BUDGET * sum(shape.flops(shape.hidden) for shape in shapes)
    image_channels, trunk_size = max(task.channels for task in tasks), trunk_size or shapes[0].in_size
    width = max(8, shapes[0].channels)
    while width > 8 and SelectorConfig((width, 2 * width, 2 * width)).flops(image_channels, trunk_size) > budget:
        width = max(8, width - 8)
    return SelectorConfig((width, 2 * width, 2 * width))


class ResidualStep(nn.Module):
    """`relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))`; the shortcut is pooled and has zeros for new channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNormReLU(in_channels, channels, 3, stride, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = DynamicBatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, channels, H', W']
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return F.relu(self.norm(self.conv(self.first(x))) + F.pad(shortcut, (0, 0, 0, 0, 0, self.added)))

    def numel(self) -> int:
        """Weights of the convolutions."""
        return self.first.conv.weight.numel() + self.conv.weight.numel()


class PlainStep(ConvNormReLU):
    """A 3x3 convolution that halves the map, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 2) -> None:
        super().__init__(in_channels, channels, 3, stride, 1)

    def numel(self) -> int:
        """Weights of the convolution."""
        return self.conv.weight.numel()


class Selector(nn.Module):
    """Stems, shared convolutions, global average pool, norm and head -> logits [B, N, L].

    The norm before the heads takes out what all images of a task (with a shared head: of all tasks) have in common,
    since pooled activations share a large mean: without it the head's weights learn one structure for everything long
    before they learn how images differ, and the selector's variety collapses.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        config: SelectorConfig,
        num_blocks: int,
        levels: int,
        trunk_size: int,
        stem: int = 0,
        joint: bool = False,
    ) -> None:
        """`stem`: channels of the estimator's stems, which it reads with `config.reads == "stem"`; `joint`: the tasks
        are labels of the same images and share a stem."""
        super().__init__()
        self.tasks, self.num_blocks, self.levels, self.config = tuple(tasks), num_blocks, levels, config
        self.sizes, widths = config.sizes(trunk_size), config.widths(stem)
        if not widths[0]:
            raise ValueError("selector: backbone must have stems for a selector that reads them, got none")
        step = ResidualStep if config.residual else PlainStep
        self.stems: Modules[Stem] = Modules(
            Stem(task, widths[0], trunk_size, self.sizes[0])
            for task in (tasks[:1] if joint else tasks)
            if config.reads == "images"
        )
        strides = [1 if size == before else 2 for before, size in itertools.pairwise(self.sizes)]
        self.convs = nn.Sequential(
            *(step(*pair, stride) for pair, stride in zip(itertools.pairwise(widths), strides, strict=True))
        )
        count = 1 if config.shared_head else len(tasks)
        self.norms: Modules[FeatureNorm] = Modules(FeatureNorm(widths[-1], affine=False) for _ in range(count))
        self.heads: Modules[nn.Linear] = Modules(nn.Linear(widths[-1], num_blocks * levels) for _ in range(count))
        for head in self.heads:
            if config.heads == "xavier":
                nn.init.xavier_uniform_(head.weight)
            else:
                nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self._one_call = OneCall()

    def forward(self, images: Images, task: Tasks, stem: Tensor | None = None) -> Tensor:
        """Logits [B, N, L] of the levels of every block, in the order of the images.

        Args:
            images: [B, C, S, S], or a list of one such tensor per task.
            task: one task, a list per task, or tasks per instance: see `den.nn.task_batch.task_batch`.
            stem: maps of the estimator's stems [B, C, H, W], in the order of the batch, where it reads them.

        Raises:
            ValueError: images or task that do not fit.
        """
        batch = task_batch(images, task, self.tasks, like=self.heads[0].weight)
        return batch.restore(self.run(batch, stem))

    def run(self, batch: TaskBatch, stem: Tensor | None = None) -> Tensor:
        """Logits [B, N, L] of a checked batch, in the batch's own order."""
        network = self.one_call(batch)
        if network is None:
            return self.logits(self.features(batch, stem), batch.tasks)
        return self._of_blocks(network(batch.tasks, batch.images))

    def features(self, batch: TaskBatch, stem: Tensor | None = None) -> list[Tensor]:
        """Normed features [B_k, C] that the heads read, of each task of a checked batch; with a shared head of all."""
        if self.config.reads == "stem":
            if stem is None:
                raise ValueError("selector: stem must be the maps of the estimator's stems, got None")
            x = stem
        else:
            maps = [self.stem_of(k)(images) for k, images in zip(batch.tasks, batch.images, strict=True)]
            x = maps[0] if len(maps) == 1 else torch.cat(maps)
        pooled = self.convs(x).mean((2, 3))
        if self.config.shared_head:
            return [self.norms[0](pooled)]
        parts = pooled.split([images.shape[0] for images in batch.images])
        return [self.norms[k](part) for k, part in zip(batch.tasks, parts, strict=True)]

    def logits(self, features: Sequence[Tensor], tasks: Sequence[int]) -> Tensor:
        """Logits [B, N, L] of `features` of the tasks at these positions."""
        heads = [self.heads[0]] if self.config.shared_head else [self.heads[k] for k in tasks]
        return self._of_blocks([head(part) for head, part in zip(heads, features, strict=True)])

    def _of_blocks(self, parts: list[Tensor]) -> Tensor:
        """Logits [B_k, N * L] of parts of a batch as [B, N, L]."""
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, self.num_blocks, self.levels)

    def choose(self, batch: TaskBatch, stem: Tensor | None = None) -> Tensor:
        """The most probable levels int64 [B, N] of a checked batch, in the batch's own order; without a gradient."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.choose(batch, stem)
        network = self.one_call(batch)
        if network is None:
            return self.run(batch, stem).argmax(-1)
        return network.choose(batch.tasks, batch.images, self.num_blocks)

    def one_call(self, batch: TaskBatch) -> TaskNetwork | None:
        """The selector of a checked batch in one call; None where its layers have to be called one by one."""
        return self._one_call.network(self, batch, self._layers, self._fold, self.config)

    def _layers(self) -> Layers | None:
        """The layers that `_fold` folds; None where it does not."""
        if self.config.residual or self.config.reads == "stem":
            return None
        standing, parts = Standing(), (self.stems, self.convs, self.norms, self.heads)
        standing.keep_children(self, *parts)
        return Layers(
            tuple([each for part in parts for each in part._modules.values() if each is not None]), tuple, standing
        )

    def _fold(self) -> TaskNetwork | None:
        tasks = range(len(self.tasks))
        if not fits(self.stems, self.heads, self.convs):
            return None
        stems, heads = [self.stem_of(k) for k in tasks], [self.head(k) for k in tasks]
        norms = [self.norms[0 if self.config.shared_head else k] for k in tasks]
        return conv_network(stems, cast(Iterable[PlainStep], self.convs), norms, heads)

    def stem_of(self, task: int) -> Stem:
        """The stem of the task at a position."""
        return self.stems[min(task, len(self.stems) - 1)]

    def head(self, task: int) -> nn.Linear:
        """The head of the task at a position."""
        return self.heads[0 if self.config.shared_head else task]

    def separate_heads(self) -> None:
        """Give every task a norm and a head of its own, copies of the shared ones, in place."""
        if self.config.shared_head:
            self.config = dataclasses.replace(self.config, shared_head=False)
            for shared in (self.norms, self.heads):
                shared.extend(copy.deepcopy(shared[0]) for _ in self.tasks[1:])

    def flops(self, task: int) -> int:
        """FLOPs of convolutions and head for one image of the task at position `task`: twice the multiply-adds."""
        layers = zip(cast(Iterable[PlainStep | ResidualStep], self.convs), self.sizes[1:], strict=True)
        convs = sum(2 * layer.numel() * size**2 for layer, size in layers)
        stem = self.stem_of(task).flops() if len(self.stems) else 0
        return stem + convs + 2 * self.head(task).weight.numel()
