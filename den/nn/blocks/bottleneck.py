"""The elastic bottleneck block, plain or with cardinality: 1x1, 3x3, 1x1 (ResNet-50, ResNeXt)."""

from dataclasses import dataclass

from torch import Tensor

from den.nn.blocks.residual import FoldedBlock, Shortcut
from den.nn.blocks.shape import BlockShape
from den.nn.modules import initialise, lay_out_channels_last
from den_kernels import (
    BottleneckWeights,
    DynamicBatchNorm2d,
    DynamicConv2d,
    Route,
    dynamic_bottleneck,
    dynamic_bottleneck_,
)


@dataclass(frozen=True)
class BottleneckShape(BlockShape):
    """`in_channels -> width` (1x1), `width -> width` (3x3, in `cardinality` groups), `width -> channels` (1x1).

    A level keeps whole cardinality groups, the first ones.
    """

    stride: int
    cardinality: int = 1

    @property
    def unit(self) -> int:
        return self.hidden // self.cardinality if self.cardinality > 1 else 1

    @property
    def size(self) -> int:
        return -(-self.in_size // self.stride)

    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        inputs = self.unit if self.cardinality > 1 else width
        return (
            (self.in_channels * width, self.in_size),
            (9 * width * inputs, self.size),
            (width * self.channels, self.size),
        )

    def build(self, levels: int, first: bool = False) -> "BottleneckBlock":
        return BottleneckBlock(self, levels, first=first)


class BottleneckBlock(FoldedBlock):
    """The block `shortcut(x) + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x))))))))` of elastic hidden channels.

    Input [B, in_channels, H, W] -> output [B, channels, ceil(H / stride), ceil(W / stride)]; both widths between the
    convolutions are the hidden one, and an instance at level `l` uses the first `l` groups of both. conv2 has the
    stride and the cardinality (He et al., CVPR 2016; Xie et al., CVPR 2017), pre-activation as the basic block; level
    0 is exactly the shortcut, and the batch norms see the instances that `den.nn.blocks.ElasticBlock`'s see.

    In eval mode without gradients the block runs as one op on folded weights, `den_kernels.dynamic_bottleneck`,
    and on a CPU only the instances above level 0 are read: at level 0 an instance costs nothing.

    Args:
        shape: channels, stride and cardinality.
        first: the network's first block, whose input is activated already: no bn1, no ReLU before conv1.

    Raises:
        ValueError: a stride other than 1 and 2, fewer channels out than in, levels that the hidden channels or their
            cardinality groups cannot be cut into; `x` of other channels, without pixels or on another device; a route
            of other groups or instances.
        TypeError: `x` of another dtype than a frozen block.
    """

    op, op_ = staticmethod(dynamic_bottleneck), staticmethod(dynamic_bottleneck_)

    def __init__(self, shape: BottleneckShape, levels: int, *, first: bool = False) -> None:
        super().__init__()
        groups, width = shape.groups(levels), shape.hidden
        self.stride = shape.stride
        self.shortcut = Shortcut(shape.in_channels, shape.channels, shape.stride, "BottleneckBlock")
        self.bn1 = None if first else DynamicBatchNorm2d(shape.in_channels, groups=1)
        self.conv1 = DynamicConv2d(shape.in_channels, width, 1, bias=False, out_groups=groups)
        self.bn2 = DynamicBatchNorm2d(width, groups=groups)
        self.conv2 = DynamicConv2d(
            width, width, 3, shape.stride, 1, 1, shape.cardinality, False, out_groups=groups, in_groups=groups
        )
        self.bn3 = DynamicBatchNorm2d(width, groups=groups)
        self.conv3 = DynamicConv2d(width, shape.channels, 1, bias=False, in_groups=groups)
        for conv in (self.conv1, self.conv2, self.conv3):
            initialise(conv)
        lay_out_channels_last(self)

    def layers(self) -> tuple[tuple[DynamicConv2d, DynamicBatchNorm2d | None], ...]:
        """The convolutions in order, each with the batch norm (and ReLU) that follows it."""
        return (self.conv1, self.bn2), (self.conv2, self.bn3), (self.conv3, None)

    def residual(self, x: Tensor, route: Route | None = None) -> Tensor:
        """All but the shortcut, over the selected channels; 0 for instances at level 0."""
        if self.bn1 is not None:
            x = self.bn1(x, None if route is None else route.active(), relu=True)
        hidden = self.bn2(self.conv1(x, route), route, relu=True)
        hidden = self.bn3(self.conv2(hidden, route), route, relu=True)
        return self.conv3(hidden, route)

    def _fold(self) -> BottleneckWeights:
        folded = BottleneckWeights.fold(self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3)
        return folded.released()  # packed where the kernel of the whole block runs: one copy is enough
