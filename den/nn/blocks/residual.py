"""The elastic residual block: hidden channels that each instance uses as many of as it chose."""

from dataclasses import dataclass

import torch
from torch import Tensor

from den.nn.blocks.folded import FoldedBlock, Shortcut
from den.nn.blocks.shape import BlockShape
from den.nn.initial import initialise
from den.nn.levels import level_groups
from den.nn.modules import lay_out_channels_last
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, ResidualWeights, Route, dynamic_residual, dynamic_residual_


@dataclass(frozen=True)
class ResidualShape(BlockShape):
    """Two 3x3 convolutions, `in_channels -> width -> channels`, the first with the stride."""

    stride: int

    @property
    def size(self) -> int:
        return -(-self.in_size // self.stride)

    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        return (9 * self.in_channels * width, self.size), (9 * width * self.channels, self.size)

    def build(self, levels: int, first: bool = False) -> "ElasticBlock":
        return ElasticBlock(self.in_channels, self.channels, levels, stride=self.stride, first=first)


class ElasticBlock(FoldedBlock):
    """The block `shortcut(x) + conv2(relu(bn2(conv1(relu(bn1(x))))))` whose hidden channels are elastic.

    Input [B, in_channels, H, W] -> output [B, channels, ceil(H / stride), ceil(W / stride)], channels-last in memory.
    An instance at level `l` uses the first `l` groups of hidden channels and nothing else; at level 0 the block is
    exactly its shortcut: 2x2 average pooling where `stride` is 2, and zeros for the channels that are new. While
    training, bn1 takes its statistics from the instances above level 0 and bn2, channel by channel, from those that
    use the channel.

    In eval mode without gradients the block runs in one call on folded weights, which are kept until a parameter or
    a running statistic changes.

    Args:
        first: the network's first block, whose input is activated already: no bn1, no ReLU before conv1.

    Attributes:
        in_place: whether a CPU kernel reads weights of many channels where the parameters lie, so that a network that
            keeps its parameters holds them once: slower (WRN-32-4, bfloat16, B = 8: by a sixth; 31 MB at the peak in
            place of 43), and none of it in a frozen network. None: of float32 weights. bfloat16 needs AVX-512 BF16.
    """

    in_place: bool | None = None
    op, op_ = staticmethod(dynamic_residual), staticmethod(dynamic_residual_)

    def __init__(self, in_channels: int, channels: int, levels: int, *, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        self.shortcut = Shortcut(in_channels, channels, stride, "ElasticBlock")
        groups = level_groups(channels, levels)
        self.stride = stride
        self.bn1 = None if first else DynamicBatchNorm2d(in_channels, groups=1)
        self.conv1 = DynamicConv2d(in_channels, channels, 3, stride, padding=1, bias=False, out_groups=groups)
        self.bn2 = DynamicBatchNorm2d(channels, groups=groups)
        self.conv2 = DynamicConv2d(channels, channels, 3, padding=1, bias=False, in_groups=groups)
        for conv in (self.conv1, self.conv2):
            initialise(conv)
        lay_out_channels_last(self)

    def layers(self) -> tuple[tuple[DynamicConv2d, DynamicBatchNorm2d | None], ...]:
        """The convolutions in order, each with the batch norm (and ReLU) that follows it."""
        return (self.conv1, self.bn2), (self.conv2, None)

    def residual(self, x: Tensor, route: Route | None = None) -> Tensor:
        """`conv2(relu(bn2(conv1(relu(bn1(x))))))` over the selected channels; 0 for instances at level 0."""
        if self.bn1 is not None:
            x = self.bn1(x, None if route is None else route.active(), relu=True)
        hidden = self.bn2(self.conv1(x, route), route, relu=True)
        return self.conv2(hidden, route)

    def settings(self) -> tuple[object, ...]:
        return (*super().settings(), self.in_place)

    def _fold(self) -> ResidualWeights:
        stays = self.conv1.weight.dtype == torch.float32 if self.in_place is None else self.in_place
        return ResidualWeights.fold(self.conv1, self.bn1, self.conv2, self.bn2, copy=not stays)
