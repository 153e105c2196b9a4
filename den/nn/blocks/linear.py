"""Two fully connected layers whose shared hidden features are elastic: the last block of a VGG."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks.shape import BlockShape
from den.nn.modules import lay_out_channels_last
from den_kernels import DynamicConv2d, Route


@dataclass(frozen=True)
class LinearPairShape(BlockShape):
    """Two fully connected layers, `in_channels * in_size**2 -> width -> channels`: they read the flattened map.

    dropout: probability with which training drops a feature that either layer writes.
    """

    dropout: float = 0.0
    lowest: ClassVar[int] = 1

    @property
    def features(self) -> int:
        """Numbers of the flattened map, which the first layer reads."""
        return self.in_channels * self.in_size**2

    @property
    def size(self) -> int:
        return 1

    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        return (self.features * width, 1), (width * self.channels, 1)

    def build(self, levels: int, first: bool = False) -> "LinearPair":
        return LinearPair(self, levels)


class ElasticLinear(DynamicConv2d):
    """A fully connected layer as a 1x1 convolution of maps of one pixel: [B, in, 1, 1] -> [B, out, 1, 1]."""

    def forward(self, x: Tensor, selection: Route | Tensor | None = None) -> Tensor:
        """x: [B, in, 1, 1]; selection: levels [B], mask [B, G], Route, or None for the whole layer.

        The whole layer is a product of matrices: as a convolution it takes oneDNN several times as long.
        """
        if selection is None:
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]
        return super().forward(x, selection)


class LinearPair(nn.Module):
    """The block `dropout(relu(fc2(dropout(relu(fc1(flatten(x)))))))`, whose hidden features are elastic.

    Input [B, in_channels, in_size, in_size] -> output [B, channels, 1, 1]. As a pair of convolutions it has no shortcut
    to fall back on: the lowest level is one group, and an instance uses its groups of hidden features and all output
    features. A hidden feature that an instance does not use is exactly 0 and gets no bias.

    Weights start from He's initialisation (fan-in), biases from zero.

    Raises:
        ValueError: levels that the hidden features cannot be cut into; `x` of another number of features.
    """

    def __init__(self, shape: LinearPairShape, levels: int) -> None:
        super().__init__()
        groups = shape.groups(levels)
        self.fc1 = ElasticLinear(shape.features, shape.hidden, 1, out_groups=groups)
        self.fc2 = ElasticLinear(shape.hidden, shape.channels, 1, in_groups=groups)
        self.dropout = nn.Dropout(shape.dropout)
        for layer, _ in self.layers():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
        lay_out_channels_last(self)

    def layers(self) -> tuple[tuple[ElasticLinear, None], tuple[ElasticLinear, None]]:
        """The layers in order, each with the batch norm that follows it: none."""
        return (self.fc1, None), (self.fc2, None)

    def forward(self, x: Tensor, route: Route | None = None, *, inplace: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: [B, in_channels, in_size, in_size].
            route: groups of the instances, at least 1 each; None: all hidden features for all.
            inplace: ignored; `x` is left alone.
        """
        features = x.flatten(1)[:, :, None, None]
        hidden = self.dropout(F.relu(self.fc1(features, route)))
        return self.dropout(F.relu(self.fc2(hidden, route)))
