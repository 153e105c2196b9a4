"""The blocks of a backbone as data: lists of shapes, of stages, the channels that come in and the side of the map."""

from collections.abc import Callable
from functools import partial

from den.nn.blocks import BlockShape, BottleneckShape, LinearPairShape, PairShape, ResidualShape

Stages = tuple[tuple[int, int], ...]  # (channels, blocks) of each stage; of convolution pairs (channels, convolutions)
Shapes = Callable[[Stages, int, int], tuple[BlockShape, ...]]  # of stages, channels and side of the first block's map


def block_shapes(stages: Stages, stem: int, trunk_size: int) -> tuple[BlockShape, ...]:
    """Basic residual blocks in order. Every stage but the first halves the map, rounding up, in its first block."""
    return _residual_shapes(stages, stem, trunk_size, lambda stage, channels: channels, ResidualShape)


def bottleneck_shapes(
    stages: Stages, stem: int, trunk_size: int, cardinality: int, depth: int
) -> tuple[BlockShape, ...]:
    """Bottleneck blocks in order, strides as `block_shapes`'; `cardinality * depth * 2**stage` hidden channels.

    So ResNeXt's c x d, and ResNet-50 as 1 x 64 (Xie et al., CVPR 2017, table 1).
    """
    block = partial(BottleneckShape, cardinality=cardinality)
    return _residual_shapes(stages, stem, trunk_size, lambda stage, _: cardinality * depth * 2**stage, block)


def _residual_shapes(
    stages: Stages, stem: int, size: int, hidden: Callable[[int, int], int], block: Callable[..., BlockShape]
) -> tuple[BlockShape, ...]:
    widths = [stem, *(channels for channels, _ in stages)]
    if sorted(widths) != widths:
        raise ValueError(f"backbone: channels must not shrink from the stem through the stages, got {widths}")
    shapes: list[BlockShape] = []
    in_channels = stem
    for stage, (channels, blocks) in enumerate(stages):
        for index in range(blocks):
            stride = 2 if stage and not index else 1
            shapes.append(block(in_channels, hidden(stage, channels), channels, size, stride=stride))
            in_channels, size = channels, shapes[-1].size
    return tuple(shapes)


def pair_shapes(stages: Stages, stem: int, trunk_size: int, strided: bool = False) -> tuple[BlockShape, ...]:
    """Consecutive 3x3 convolutions, two by two; 2x2 max pooling, rounding down, after the last of every stage.

    strided: that last convolution has a stride of 2 instead.

    `pair_shapes(((32, 1), (64, 1)), 3, 32) == (PairShape(3, 32, 64, 32, pools=(True, True)),)`

    Raises:
        ValueError: an odd number of convolutions; a trunk too small for the pools.
    """
    layers = [(channels, index == blocks - 1) for channels, blocks in stages for index in range(blocks)]
    if len(layers) % 2:
        raise ValueError(f"backbone: stages must have an even number of convolutions (pairs), got {len(layers)}")
    if trunk_size < 2 ** len(stages):
        raise ValueError(
            f"backbone: trunk_size must be at least {2 ** len(stages)} for {len(stages)} poolings, got {trunk_size}"
        )
    shapes: list[PairShape] = []
    in_channels, size = stem, trunk_size
    for (hidden, first_pool), (channels, second_pool) in zip(layers[::2], layers[1::2], strict=True):
        shapes.append(PairShape(in_channels, hidden, channels, size, (first_pool, second_pool), strided))
        in_channels, size = channels, shapes[-1].size
    return tuple(shapes)


def with_linear_pair(shapes: Shapes, hidden: int, channels: int, dropout: float = 0.0) -> Shapes:
    """The blocks of `shapes`, and behind them one of two fully connected layers of elastic hidden features.

    Of a backbone whose `fully_connected` is `()`: the block hands its `channels` features to the heads.
    """

    def extended(stages: Stages, stem: int, trunk_size: int) -> tuple[BlockShape, ...]:
        blocks = shapes(stages, stem, trunk_size)
        last = blocks[-1]
        return *blocks, LinearPairShape(last.channels, hidden, channels, last.size, dropout)

    return extended
