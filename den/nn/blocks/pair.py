"""Two consecutive convolutions whose shared hidden channels are elastic: the block of VGG and SimpleConvNet."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks.shape import BlockShape
from den.nn.folding import folded_conv, norm_tensors
from den.nn.modules import initialise, lay_out_channels_last
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, Route
from den_kernels.building import FoldCache, may_fold


@dataclass(frozen=True)
class PairShape(BlockShape):
    """Two 3x3 convolutions, `in_channels -> width -> channels`, each followed by 2x2 max pooling where `pools`.

    strided: these have a stride of 2 in place of the pooling, which costs a quarter and rounds up.
    """

    pools: tuple[bool, bool]
    strided: bool = False
    lowest: ClassVar[int] = 1

    @property
    def strides(self) -> tuple[int, int]:
        """Strides of the convolutions."""
        first, second = (2 if self.strided and pool else 1 for pool in self.pools)
        return first, second

    @property
    def middle_size(self) -> int:
        """Side of the map that the second convolution reads."""
        return self._halved(self.in_size) if self.pools[0] else self.in_size

    @property
    def size(self) -> int:
        return self._halved(self.middle_size) if self.pools[1] else self.middle_size

    def _halved(self, size: int) -> int:
        return -(-size // 2) if self.strided else size // 2

    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        written = (self.middle_size, self.size) if self.strided else (self.in_size, self.middle_size)
        return (9 * self.in_channels * width, written[0]), (9 * width * self.channels, written[1])

    def build(self, levels: int, first: bool = False) -> "ConvPair":
        return ConvPair(self, levels)


class ConvPair(nn.Module):
    """The block `pool2(relu(bn2(conv2(pool1(relu(bn1(conv1(x))))))))`, whose hidden channels are elastic.

    Input [B, in_channels, H, W] -> output [B, channels, H', W'], both sides halved, rounding down, by each pool, or by
    the stride of the convolution in its place, rounding up.
    There is no shortcut to fall back on: routes have one group more than a residual block's, and the lowest level, one
    group. An instance uses its groups of hidden channels and all output channels. While training, bn1 takes its
    statistics, channel by channel, from the instances that use the channel, bn2 from all (Ahn, Kim, Oh, ICCV 2019,
    section 4.1; batch norm as every VGG trained on CIFAR has it).

    In eval mode without gradients both batch norms are folded into the convolutions.

    Raises:
        ValueError: levels that the hidden channels cannot be cut into.
    """

    def __init__(self, shape: PairShape, levels: int) -> None:
        super().__init__()
        groups = shape.groups(levels)
        self.pools = (False, False) if shape.strided else shape.pools
        first, second = shape.strides
        self.conv1 = DynamicConv2d(shape.in_channels, shape.hidden, 3, first, 1, bias=False, out_groups=groups)
        self.bn1 = DynamicBatchNorm2d(shape.hidden, groups=groups)
        self.conv2 = DynamicConv2d(shape.hidden, shape.channels, 3, second, 1, bias=False, in_groups=groups)
        self.bn2 = DynamicBatchNorm2d(shape.channels)
        for conv in (self.conv1, self.conv2):
            initialise(conv)
        lay_out_channels_last(self)
        self._folded: FoldCache[tuple[DynamicConv2d, DynamicConv2d]] = FoldCache()

    def layers(self) -> tuple[tuple[DynamicConv2d, DynamicBatchNorm2d], tuple[DynamicConv2d, DynamicBatchNorm2d]]:
        """The convolutions in order, each with the batch norm (and ReLU) that follows it."""
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor, route: Route | None = None, *, inplace: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: [B, in_channels, H, W].
            route: groups of the instances, at least 1 each; None: all hidden channels for all.
            inplace: ignored; `x` is left alone.
        """
        if route is not None and may_fold(self) and x.dtype == self.conv1.weight.dtype:
            conv1, conv2 = self.folded()
            hidden = self._pool(conv1(x, route).relu_(), 0)
            return self._pool(conv2(hidden, route).relu_(), 1)
        hidden = self._pool(self.bn1(self.conv1(x, route), route, relu=True), 0)
        return self._pool(self.bn2(self.conv2(hidden, route), relu=True), 1)

    def _pool(self, x: Tensor, index: int) -> Tensor:
        return F.max_pool2d(x, 2) if self.pools[index] else x

    def folded(self) -> tuple[DynamicConv2d, DynamicConv2d]:
        """Both convolutions with their batch norm (eval mode), from the cache while nothing they depend on changed."""
        sources = tuple(t for conv, norm in self.layers() for t in (conv.weight, *norm_tensors(norm)))
        first, second = self.layers()
        return self._folded.get(
            sources, lambda: (folded_conv(*first), folded_conv(*second)), first[1].eps, second[1].eps
        )

    def train(self, mode: bool = True) -> "ConvPair":
        self._folded.clear()
        return super().train(mode)
