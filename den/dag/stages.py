"""Stages: states whose maps are half as wide, each stage with twice the channels of the one before.

An edge from stage s to stage t has stride 2^(t - s).  A state of a later stage s is read in through the means over
2^s x 2^s pixels and a 1x1 convolution, batch norm and ReLU, and read out through a 1x1 convolution and bilinear
interpolation; both belong to the stage: all its states and all tasks share them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.dag.edge import Edge
from den.dag.model_config import DagConfig
from den.nn.blocks import ElasticBlock
from den.nn.levels import level_widths
from den_kernels import DynamicConv2d, Route


class StageEnds(nn.Module):
    """Read-in and read-out of a stage after the first, for the instances whose task has one there; 0 elsewhere."""

    def __init__(self, config: DagConfig, stage: int) -> None:
        super().__init__()
        channels = config.stage_channels(stage)
        self.stage, self.out_size = stage, config.map_size()
        self.read_in = Edge(config.channels, config.groups, channels, kernel_size=1)
        self.read_out = DynamicConv2d(channels, config.channels, 1, bias=False, out_groups=config.groups)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def read(self, x: Tensor, route: Route | None) -> Tensor:
        """Maps of the first stage [B, C, H, W] -> of this one."""
        return self.read_in(pooled(x, self.stage), route)

    def write(self, out: Tensor, route: Route | None) -> Tensor:
        """Gated sum of this stage's states -> [B, C, H, W] of the first one."""
        return enlarged(self.read_out(out, route), self.out_size)


def make_edge(config: DagConfig, tail: int, head: int) -> Edge | ElasticBlock:
    """The edge between two states, by the stages that they are in.

    Raises ValueError for a residual block whose stride would be more than 2.
    """
    channels, out_channels, stride = edge_geometry(config, tail, head)
    if config.edge == "residual":
        return ElasticBlock(channels, out_channels, config.groups + 1, stride=stride)
    return Edge(channels, config.groups, out_channels, stride)


def edge_geometry(config: DagConfig, tail: int, head: int) -> tuple[int, int, int]:
    """Input channels, output channels and stride of the edge between two states."""
    before, after = (config.graph.stage_of[state] for state in (tail, head))
    return config.stage_channels(before), config.stage_channels(after), 2 ** (after - before)


def edge_width(config: DagConfig, out_channels: int, level: int) -> int:
    """Channels that a level of an edge computes: of its output, of a residual block its hidden ones."""
    if config.edge == "residual":
        return level_widths(out_channels, config.groups + 1)[level]
    return out_channels * level // config.groups


def edge_flops(config: DagConfig, tail: int, head: int, level: int | None = None) -> int:
    """Twice the multiply-adds of an edge's convolutions for one image, at a level; None: of all channel groups."""
    channels, out_channels, _ = edge_geometry(config, tail, head)
    height, width = config.map_size(config.graph.stage_of[head])
    computed = edge_width(config, out_channels, config.groups if level is None else level)
    inputs = channels + out_channels if config.edge == "residual" else channels
    return 2 * 9 * inputs * computed * height * width


def stage_end_flops(config: DagConfig, stage: int) -> int:
    """Twice the multiply-adds of the read-in of a stage for one image; its read-out has as many."""
    height, width = config.map_size(stage)
    return 2 * config.channels * config.stage_channels(stage) * height * width


def pooled(x: Tensor, stage: int) -> Tensor:
    """Means of x [B, C, H, W] over 2^stage x 2^stage pixels, fewer at the lower and the right border."""
    return F.avg_pool2d(x, 2**stage, ceil_mode=True)


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """x [B, C, h, w], interpolated bilinearly to a height and width."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
