"""The estimator in plain PyTorch: everything is computed and masked after the activation. The oracle for the real one.

Slow and obvious on purpose. It reads the parameters of an :class:`den.estimator.Estimator` (or one of its blocks) and
updates its running statistics while training, as the real one does; gradients flow through autograd alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.blocks import ElasticBlock
from den.estimator import Estimator
from den.levels import level_widths


def masked_batch_norm(x: Tensor, mask: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm whose statistics come, channel by channel, only from the instances that use the channel.

    x: [B, C, H, W]; mask: bool [B, C]. While training, a channel that no instance uses keeps its running statistics.
    Values of channels that are not used are meaningless.
    """
    if not norm.training:
        mean, var = norm.running_mean, norm.running_var
    else:
        weight = mask[:, :, None, None].to(x.dtype)
        count = (mask.sum(0) * x.shape[2] * x.shape[3]).to(x.dtype)
        mean = (x * weight).sum((0, 2, 3)) / count.clamp(min=1)
        var = ((x - mean[:, None, None]).square() * weight).sum((0, 2, 3)) / count.clamp(min=1)
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1)
            for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                running.copy_(torch.where(count > 0, running.lerp(batch, norm.momentum), running))
    scale = norm.weight / torch.sqrt(var + norm.eps)
    return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def reference_block(block: ElasticBlock, x: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """``shortcut(x) + conv2(mask * relu(bn2(conv1(relu(bn1(x))))))``; x: [B, C, H, W], levels: integer [B]."""
    widths = torch.tensor(level_widths(block.conv1.out_channels, num_levels), device=x.device)
    mask = torch.arange(block.conv1.out_channels, device=x.device) < widths[levels.long()][:, None]
    active = (levels > 0)[:, None].expand(-1, x.shape[1])
    a = x if block.bn1 is None else F.relu(masked_batch_norm(x, active, block.bn1))
    hidden = F.conv2d(a, block.conv1.weight, stride=block.stride, padding=1)
    hidden = F.relu(masked_batch_norm(hidden, mask, block.bn2)) * mask[:, :, None, None]
    shortcut = x if block.stride == 1 else F.avg_pool2d(x, 2, ceil_mode=True)
    missing = block.conv2.out_channels - x.shape[1]
    zeros = shortcut.new_zeros(len(x), missing, *shortcut.shape[2:])
    return torch.cat([shortcut, zeros], 1) + F.conv2d(hidden, block.conv2.weight, padding=1)


def reference_estimator(estimator: Estimator, images: list[Tensor], tasks: list[int], levels: Tensor) -> list[Tensor]:
    """Logits of each part of a mixed batch; ``levels``: integer [B, N], one part after the other."""
    maps = []
    for k, part in zip(tasks, images, strict=True):
        stem = estimator.stems[k]
        if part.shape[-1] < stem.in_size:
            part = F.interpolate(part, size=(stem.in_size, stem.in_size), mode="bilinear", align_corners=False)
        maps.append(F.relu(stem.conv.norm(stem.conv.conv(part))))
    x = torch.cat(maps)
    for index, block in enumerate(estimator.blocks):
        x = reference_block(block, x, levels[:, index], estimator.levels)
    features = F.relu(estimator.norm(x)).mean((2, 3))
    parts = features.split([len(part) for part in images])
    return [estimator.heads[k](part) for k, part in zip(tasks, parts, strict=True)]
