"""Backbones as data: which blocks a network has, and what each of them costs."""

import re
from dataclasses import dataclass

Stages = tuple[tuple[int, int], ...]  # (channels, blocks) of each stage


@dataclass(frozen=True)
class Backbone:
    """Stages of residual blocks behind a stem of ``stem`` channels."""

    stages: Stages
    stem: int


@dataclass(frozen=True)
class BlockShape:
    """One residual block: two 3x3 convolutions, ``in_channels -> width -> channels``, writing ``size x size`` maps."""

    in_channels: int
    channels: int
    stride: int
    size: int

    def parameters(self, width: int) -> int:
        """Convolution weights in use when ``width`` hidden channels are (batch norm is counted apart)."""
        return 9 * width * (self.in_channels + self.channels)

    def flops(self, width: int) -> int:
        """Twice the multiply-adds of both convolutions for one image (both write a map of ``size x size``)."""
        return 2 * self.parameters(width) * self.size**2


def block_shapes(stages: Stages, stem: int, trunk_size: int) -> tuple[BlockShape, ...]:
    """The blocks in order. Every stage but the first halves the map, rounding up, in its first block."""
    shapes: list[BlockShape] = []
    in_channels, size = stem, trunk_size
    for stage, (channels, blocks) in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            size = -(-size // stride)
            shapes.append(BlockShape(in_channels, channels, stride, size))
            in_channels = channels
    return tuple(shapes)


def _blocks_per_stage(name: str, depth: int, stages: int) -> int:
    """``n`` of ``depth = 2 stages n + 2``: two convolutions a block, the stem and the head."""
    step = 2 * stages
    blocks, rest = divmod(depth - 2, step)
    if blocks < 1 or rest:
        nearest = sorted({step * max(1, n) + 2 for n in (blocks, blocks + 1)})
        raise ValueError(
            f"{name}: depth must be {step} n + 2 (two convolutions a block, {stages} stages of n blocks, stem, head),"
            f" got {depth}; nearest: {' and '.join(map(str, nearest))}"
        )
    return blocks


def wide_resnet(depth: int, width: int) -> Backbone:
    """WRN-l-r of the paper: three stages of 16r, 32r, 64r channels, l = 6n + 2 (WRN-32-4: n = 5), stem of 16.

    Zagoruyko and Komodakis count l = 6n + 4, with the 1x1 convolutions of two shortcuts; ours have no convolution.

    Raises:
        ValueError: a depth that does not fit, naming the nearest that do; a width below 1.
    """
    if width < 1:
        raise ValueError(f"wide_resnet: width must be at least 1, got {width}")
    blocks = _blocks_per_stage("wide_resnet", depth, 3)
    return Backbone(tuple((base * width, blocks) for base in (16, 32, 64)), stem=16)


def resnet(depth: int) -> Backbone:
    """ResNet-l of the paper: four stages of 64, 128, 256, 512 channels, l = 8n + 2 (ResNet-42: n = 5), stem of 64.

    Every stage has the same number of blocks; give ``stages`` for another split, such as ResNet-34's 3, 4, 6, 3.

    Raises:
        ValueError: a depth that does not fit, naming the nearest that do.
    """
    blocks = _blocks_per_stage("resnet", depth, 4)
    return Backbone(tuple((channels, blocks) for channels in (64, 128, 256, 512)), stem=64)


BACKBONES: dict[str, Backbone] = {
    "wrn14_1": wide_resnet(14, 1),
    "wrn14_2": wide_resnet(14, 2),
    "wrn32_4": wide_resnet(32, 4),
    "resnet18": resnet(18),
    "resnet42": resnet(42),
}
DEFAULT_STEM = {"wrn": 16, "resnet": 64}  # of a family, where the stages are given one by one


def named_backbone(name: str) -> Backbone:
    """The backbone of a name: one of ``BACKBONES``, or any ``wrn{l}_{r}`` or ``resnet{l}``.

    Raises:
        ValueError: another name, or a depth that does not fit.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        return wide_resnet(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"resnet(\d+)", name):
        return resnet(int(match[1]))
    raise ValueError(f"backbone must be wrn{{l}}_{{r}} or resnet{{l}}, such as {', '.join(BACKBONES)}, got {name!r}")
