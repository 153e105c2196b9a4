"""Kinds of elastic blocks, one a file: what it is as data (a BlockShape) beside the module that runs it."""

from den.nn.blocks.bottleneck import BottleneckBlock, BottleneckShape
from den.nn.blocks.linear import LinearPair, LinearPairShape
from den.nn.blocks.pair import ConvPair, PairShape
from den.nn.blocks.residual import ElasticBlock, ResidualShape
from den.nn.blocks.shape import BlockShape

__all__ = [
    "BlockShape",
    "BottleneckBlock",
    "BottleneckShape",
    "ConvPair",
    "ElasticBlock",
    "LinearPair",
    "LinearPairShape",
    "PairShape",
    "ResidualShape",
]
