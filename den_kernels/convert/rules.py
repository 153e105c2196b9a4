"""What an operation does to an elastic map, whose channels that an instance does not select hold exactly 0."""

from typing import Any

import torch
from torch import nn

from .record import Node, Ref

# Each channel by itself, and 0 stays 0. Names of functions, and of classes in lower case.
_KEEPS_ZERO = {
    "relu", "relu6", "silu", "swish", "gelu", "hardswish", "leaky_relu", "leakyrelu", "prelu", "elu", "selu", "celu",
    "tanh", "mish", "softsign", "tanhshrink", "hardtanh", "dropout", "dropout2d", "identity", "clone", "contiguous",
    "to", "float", "detach", "neg", "abs", "type_as",
}  # fmt: skip
# Each channel by itself, but 0 becomes something else: a gate, which multiplies a map later.
_LOSES_ZERO = {"sigmoid", "hardsigmoid", "hard_sigmoid", "softplus", "clamp", "clip", "exp"}
# Each channel by itself where batch and channels, the first two axes, keep their sizes.
_SPATIAL = {
    "avg_pool2d", "avgpool2d", "max_pool2d", "maxpool2d", "adaptive_avg_pool2d", "adaptiveavgpool2d",
    "adaptive_max_pool2d", "adaptivemaxpool2d", "mean", "flatten", "view", "reshape", "squeeze", "unsqueeze",
    "getitem", "pad", "zeropad2d", "interpolate", "upsample", "expand",
}  # fmt: skip
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
PRODUCTS = ("mul", "multiply")
NEUTRAL = ("identity", "dropout")  # in evaluation mode
_SCALED = {"mul", "multiply", "div", "truediv", "divide"}
_SHIFTED = {"add", "sub"}


class Unfit(Exception):
    """Why a branch cannot be made elastic."""


def kind_of(node: Node) -> str:
    """The name of what a node does, in lower case."""
    return type(node.target).__name__.lower() if node.is_module else node.name


def has_weight(node: Node) -> bool:
    """True where a node is a convolution or a linear layer."""
    return type(node.target) in (nn.Conv2d, nn.Linear)


def is_norm(node: Node) -> bool:
    return isinstance(node.target, NORMS)


def keeps_zero(node: Node, was_zero: bool) -> bool:
    """True where channels of 0 stay 0 behind a node that treats each channel by itself. Raises Unfit for others."""
    kind = kind_of(node)
    if kind == "prelu" and getattr(node.target, "num_parameters", 2) > 1:
        raise Unfit(f"{describe(node)} has a weight for each hidden channel")
    if kind in _KEEPS_ZERO or kind in _SPATIAL:
        return was_zero and not (kind == "pad" and bool(node.kwargs.get("value") or (node.args[3:] or (0,))[0]))
    if kind in _LOSES_ZERO:
        return False
    if kind in _SCALED or kind in _SHIFTED:
        others = [value for value in node.args if not isinstance(value, Ref)]
        if len(node.inputs) == 1 and all(isinstance(value, (int, float)) for value in others):
            return was_zero and kind in _SCALED and isinstance(node.args[0], Ref)
    raise Unfit(f"{describe(node)} does not treat each hidden channel by itself")


def channel_axis(node: Node, axis: int, shape: torch.Size) -> int:
    """The axis of the channels behind a node that treats each by itself; `axis` and `shape` are those before it.

    Raises Unfit where it cannot be told.
    """
    assert node.shape is not None
    kind = kind_of(node)
    if kind == "permute":
        return _permuted(node, axis, len(shape))
    if kind == "transpose" and len(shape) == len(node.shape):
        order = list(range(len(shape)))
        a, b = (int(d) % len(shape) for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
        return order.index(axis)
    if kind in _SPATIAL:
        if axis != 1 or node.shape[:2] != shape[:2] or (kind == "mean" and _reduces(node, 1, len(shape))):
            raise Unfit(f"{describe(node)} moves the hidden channels")
        return 1
    if node.shape != shape:
        raise Unfit(f"{describe(node)} changes the shape of the hidden map")
    return axis


def _permuted(node: Node, axis: int, rank: int) -> int:
    dims: Any = getattr(node.target, "dims", None) or node.kwargs.get("dims") or node.args[1:]
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return [int(d) % rank for d in dims].index(axis)


def _reduces(node: Node, axis: int, rank: int) -> bool:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dims is None:
        return True
    return axis in [int(d) % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]


def reorders_axes(node: Node) -> bool:
    """True where a node only reorders axes."""
    return kind_of(node) in ("permute", "transpose")


def describe(node: Node) -> str:
    return (
        f"{type(node.target).__name__} {node.name}" if node.is_module else f"{node.name}() in {node.scope or 'model'}"
    )
