"""Convolutions over only the channel groups that each instance of a batch selected."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ._on_import import when_imported
from .bottleneck_weights import BottleneckWeights
from .convert import (
    ElasticModel,
    WithLevels,
    advise,
    convert,
    extract,
    freeze,
    latency_table,
    level_flops,
    levels,
    recalibrate,
    report_of,
)
from .dynamic_bottleneck import dynamic_bottleneck, dynamic_bottleneck_
from .dynamic_conv import dynamic_conv2d
from .dynamic_graph import dynamic_graph
from .dynamic_inverted_residual import dynamic_inverted_residual, dynamic_inverted_residual_
from .dynamic_norm import dynamic_batch_norm
from .dynamic_residual import dynamic_residual, dynamic_residual_
from .dynamic_trunk import TrunkWeights, dynamic_trunk
from .fold_cache import invalidate
from .graph_weights import GraphWeights
from .inverted_residual_weights import InvertedResidualWeights
from .layers import DynamicBatchNorm2d, DynamicConv2d
from .masked import masked
from .plan import Route, RoutingPlan
from .residual_weights import ResidualWeights

# FLOP formulas are registered when torch's counter is imported, and not before: it imports triton, which takes long.
when_imported("torch.utils.flop_counter", lambda: import_module("den_kernels._flops"))

try:
    __version__ = version("den-kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BottleneckWeights",
    "DynamicBatchNorm2d",
    "DynamicConv2d",
    "ElasticModel",
    "GraphWeights",
    "InvertedResidualWeights",
    "ResidualWeights",
    "Route",
    "RoutingPlan",
    "TrunkWeights",
    "WithLevels",
    "__version__",
    "advise",
    "convert",
    "dynamic_batch_norm",
    "dynamic_bottleneck",
    "dynamic_bottleneck_",
    "dynamic_conv2d",
    "dynamic_graph",
    "dynamic_inverted_residual",
    "dynamic_inverted_residual_",
    "dynamic_residual",
    "dynamic_residual_",
    "dynamic_trunk",
    "extract",
    "freeze",
    "invalidate",
    "latency_table",
    "level_flops",
    "levels",
    "masked",
    "recalibrate",
    "report_of",
]
