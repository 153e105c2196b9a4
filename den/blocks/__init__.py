"""Kinds of elastic blocks, one a file: what it is as data (a BlockShape) beside the module that runs it."""

from den.blocks.bottleneck import BottleneckBlock, BottleneckShape
from den.blocks.pair import ConvPair, PairShape
from den.blocks.residual import ElasticBlock, ResidualShape
from den.blocks.shape import BlockShape

__all__ = [
    "BlockShape",
    "BottleneckBlock",
    "BottleneckShape",
    "ConvPair",
    "ElasticBlock",
    "PairShape",
    "ResidualShape",
]
