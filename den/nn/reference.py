"""The estimator in plain PyTorch, the oracle of the tests: every channel is computed, then masked.

Slow and obvious on purpose. Maps are [B, C, H, W], levels integer [B] in 0..num_levels-1. It reads the parameters of
an `den.nn.estimator.Estimator` (or one of its blocks) and updates its running statistics while training, as the
real one does; gradients flow through autograd alone.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks import BottleneckBlock, ConvPair, ElasticBlock, LinearPair
from den.nn.ends import ImageStem
from den.nn.estimator import Estimator
from den.nn.levels import level_widths


def masked_batch_norm(x: Tensor, mask: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm whose statistics come, channel by channel, only from the instances that use the channel.

    x: [B, C, H, W]; mask: bool [B, C]. While training, a channel that no instance uses keeps its running statistics.
    Values of channels that are not used are meaningless.
    """
    running_mean, running_var = (cast(Tensor, running) for running in (norm.running_mean, norm.running_var))
    if not norm.training:
        mean, var = running_mean, running_var
    else:
        weight = mask[:, :, None, None].to(x.dtype)
        count = (mask.sum(0) * x.shape[2] * x.shape[3]).to(x.dtype)
        mean = (x * weight).sum((0, 2, 3)) / count.clamp(min=1)
        var = ((x - mean[:, None, None]).square() * weight).sum((0, 2, 3)) / count.clamp(min=1)
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1)
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                running.copy_(torch.where(count > 0, running.lerp(batch, cast(float, norm.momentum)), running))
    scale = norm.weight / torch.sqrt(var + norm.eps)
    return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def channel_mask(levels: Tensor, widths: tuple[int, ...]) -> Tensor:
    """bool [B, M], the hidden channels that instances use: the first `widths[levels[b]]` of `M = widths[-1]`."""
    kept = torch.tensor(widths, device=levels.device)[levels.long()]
    return torch.arange(widths[-1], device=levels.device) < kept[:, None]


def masked_layer(x: Tensor, mask: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """`mask * relu(norm(conv(x)))` of x [B, C, H, W] and mask bool [B, M]: [B, M, H', W']."""
    hidden = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, groups=conv.groups)
    return F.relu(masked_batch_norm(hidden, mask, norm)) * mask[:, :, None, None]


def activated(block: ElasticBlock | BottleneckBlock, x: Tensor, levels: Tensor) -> Tensor:
    """`relu(bn1(x))` [B, C, H, W] with the statistics of the instances above level 0 (levels: integer [B]).

    The first block of a network has no bn1: x is returned.
    """
    active = (levels > 0)[:, None].expand(-1, x.shape[1])
    return x if block.bn1 is None else F.relu(masked_batch_norm(x, active, block.bn1))


def add_shortcut(x: Tensor, y: Tensor) -> Tensor:
    """y [B, channels, H', W'] plus x [B, C, H, W], pooled to as small a map and with zeros for the new channels."""
    shortcut = x if x.shape[2:] == y.shape[2:] else F.avg_pool2d(x, 2, ceil_mode=True)
    zeros = shortcut.new_zeros(len(x), y.shape[1] - x.shape[1], *shortcut.shape[2:])
    return torch.cat([shortcut, zeros], 1) + y


def reference_residual(block: ElasticBlock, x: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """`shortcut(x) + conv2(mask * relu(bn2(conv1(relu(bn1(x))))))`."""
    mask = channel_mask(levels, level_widths(block.conv1.out_channels, num_levels))
    hidden = masked_layer(activated(block, x, levels), mask, block.conv1, block.bn2)
    return add_shortcut(x, F.conv2d(hidden, block.conv2.weight, padding=1))


def reference_bottleneck(block: BottleneckBlock, x: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """`shortcut(x) + conv3(mask * relu(bn3(conv2(mask * relu(bn2(conv1(relu(bn1(x)))))))))`."""
    width, cardinality = block.conv2.out_channels, block.conv2.groups
    unit = width // cardinality if cardinality > 1 else 1
    mask = channel_mask(levels, level_widths(width, num_levels, unit=unit))
    hidden = masked_layer(activated(block, x, levels), mask, block.conv1, block.bn2)
    hidden = masked_layer(hidden, mask, block.conv2, block.bn3)
    return add_shortcut(x, F.conv2d(hidden, block.conv3.weight))


def reference_pair(block: ConvPair, x: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """`pool(relu(bn2(conv2(pool(mask * relu(bn1(conv1(x))))))))`, with the pools that the block has."""
    mask = channel_mask(levels, level_widths(block.conv1.out_channels, num_levels, lowest=1))
    hidden = masked_layer(x, mask, block.conv1, block.bn1)
    hidden = F.max_pool2d(hidden, 2) if block.pools[0] else hidden
    y = masked_layer(hidden, mask.new_ones(len(x), block.conv2.out_channels), block.conv2, block.bn2)
    return F.max_pool2d(y, 2) if block.pools[1] else y


def reference_linear_pair(block: LinearPair, x: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """`dropout(relu(fc2(dropout(mask * relu(fc1(flatten(x)))))))`, [B, channels, 1, 1]."""
    mask = channel_mask(levels, level_widths(block.fc1.out_channels, num_levels, lowest=1))
    hidden = F.relu(F.linear(x.flatten(1), block.fc1.weight.flatten(1), block.fc1.bias)) * mask
    y = F.relu(F.linear(block.dropout(hidden), block.fc2.weight.flatten(1), block.fc2.bias))
    return block.dropout(y)[:, :, None, None]


REFERENCES: dict[type[nn.Module], Callable[..., Tensor]] = {
    ElasticBlock: reference_residual,
    BottleneckBlock: reference_bottleneck,
    ConvPair: reference_pair,
    LinearPair: reference_linear_pair,
}


def reference_block(block: nn.Module, x: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """Run a block of any kind: x [B, C, H, W], levels integer [B] in 0..num_levels-1 -> [B, channels, H', W']."""
    return REFERENCES[type(block)](block, x, levels, num_levels)


def reference_estimator(estimator: Estimator, images: list[Tensor], tasks: list[int], levels: Tensor) -> list[Tensor]:
    """Logits of each part of a mixed batch; `levels`: integer [B, N], one part after the other."""
    maps = []
    for k, part in zip(tasks, images, strict=True):
        stem = estimator.stem_of(k)
        if part.shape[-1] < stem.in_size:
            part = F.interpolate(part, size=(stem.in_size, stem.in_size), mode="bilinear", align_corners=False)
        maps.append(part if isinstance(stem, ImageStem) else F.relu(stem.conv.norm(stem.conv.conv(part))))
    x = torch.cat(maps)
    for index, block in enumerate(estimator.blocks):
        x = reference_block(block, x, levels[:, index], estimator.levels)
    features = x.flatten(1) if estimator.norm is None else F.relu(estimator.norm(x)).mean((2, 3))
    features = estimator.shared(features)
    parts = features.split([len(part) for part in images])
    return [estimator.heads[k](part) for k, part in zip(tasks, parts, strict=True)]
