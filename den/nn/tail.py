"""The layers between the last block and the heads."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.backbones import Backbone
from den.nn.blocks import BlockShape
from den_kernels import DynamicBatchNorm2d


def last_norm(backbone: Backbone, last: BlockShape) -> nn.BatchNorm2d | None:
    """The batch norm that a pre-activation network ends with; None where fully connected layers read the map."""
    return DynamicBatchNorm2d(last.channels) if backbone.fully_connected is None else None


def shared_layers(backbone: Backbone, last: BlockShape) -> tuple[nn.Sequential, int]:
    """The fully connected layers that all tasks share, maybe none, and how many features they hand to the heads.

    Their weights start from He's initialisation, their biases from zero.
    """
    if backbone.fully_connected is None:
        return nn.Sequential(), last.channels
    features, layers = last.channels * last.size**2, nn.Sequential()
    for width in backbone.fully_connected:
        linear = nn.Linear(features, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers.extend([linear, nn.ReLU(), nn.Dropout(backbone.dropout)])
        features = width
    return layers, features


def features(x: Tensor, norm: nn.BatchNorm2d | None, shared: nn.Sequential) -> Tensor:
    """Features [B, features] that the heads read, of the last map [B, channels, H, W]."""
    x = x.flatten(1) if norm is None else F.relu(norm(x)).mean((2, 3))
    return shared(x)


def linear_flops(layers: Sequence[nn.Module]) -> int:
    """FLOPs of the fully connected layers among `layers` for one image: twice the multiply-adds."""
    return sum(2 * layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
