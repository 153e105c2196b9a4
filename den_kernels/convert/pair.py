"""Pairs of linear layers, or 1 x 1 convolutions, of a frozen model that run as one op: the MLP of ConvNeXt."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dynamic_inverted_residual import dynamic_inverted_residual
from ..inverted_residual_weights import InvertedResidualWeights
from .carrier import Carrier
from .frozen import refuse_onnx
from .layers import Routed, RoutedConv2d, RoutedLinear, as_map
from .record import Node, Recording
from .rules import NEUTRAL, kind_of

_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "gelu": "gelu"}


class FrozenPair(nn.Module):
    """Both layers and the activation between them, over the hidden channels that each instance selected."""

    def __init__(self, first: Routed, last: Routed, weights: InvertedResidualWeights) -> None:
        super().__init__()
        self.carrier: Carrier = first.carrier
        self.block, self.weights = first.block, weights
        self.linear = isinstance(last, RoutedLinear)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., C] of linear layers, else [B, C, H, W] -> the same, of the second layer's channels."""
        refuse_onnx(x)
        route = self.carrier.route(self.block, x)
        if not self.linear:
            return dynamic_inverted_residual(x, route, self.weights)
        y = dynamic_inverted_residual(as_map(x), route, self.weights).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class _Pair(NamedTuple):
    first: Routed
    last: Routed
    activation: str
    paths: tuple[str, ...]
    """Of the first layer, and of all behind it."""


@torch.no_grad()
def join_pairs(frozen: nn.Module, recording: Recording) -> int:
    """Put a `FrozenPair` in the place of each pair of a recorded model, and nothing in that of the other modules.

    Returns the number of pairs. Only where the kernel of the op runs: elsewhere the layers do as well. Modules that
    have hooks, run several times, or whose results others read or the model returns, stay as they are.
    """
    made = 0
    for pair in list(_pairs(recording)):
        first, last = _as_conv(pair.first), _as_conv(pair.last)
        try:
            weights = InvertedResidualWeights.fold(
                first, None, None, None, last, None, activation=pair.activation, skip=False
            )
        except (ValueError, TypeError):  # shapes that the op does not take
            continue
        modules = [frozen.get_submodule(path) for path in pair.paths]
        if any(m._forward_hooks or m._forward_pre_hooks or recording.calls[id(m)] > 1 for m in modules):
            continue
        if weights.direct is None:
            continue
        frozen.set_submodule(pair.paths[0], FrozenPair(pair.first, pair.last, weights.released()))
        for path in pair.paths[1:]:
            frozen.set_submodule(path, nn.Identity())
        made += 1
    return made


def _pairs(recording: Recording) -> Iterator[_Pair]:
    for node in recording.nodes:
        chain = _followed(recording, node)
        acts = [_activation(each) for each in chain[1:-1] if kind_of(each) not in NEUTRAL]
        first, last = node.target, chain[-1].target
        if len(chain) < 3 or len(acts) != 1 or acts[0] is None or type(first) is not type(last):
            continue
        fits = first.block == last.block and first.out_groups == last.in_groups
        if fits and not first.in_groups and not last.out_groups:
            yield _Pair(first, last, acts[0], tuple(each.name for each in chain))


def _followed(recording: Recording, node: Node) -> list[Node]:
    """A layer with elastic outputs, and what alone reads each result up to the next layer; else the layer alone."""
    chain = [node]
    while isinstance(node.target, (RoutedLinear, RoutedConv2d)) and node.target.out_groups:
        readers = recording.readers(chain[-1].index)
        if len(readers) != 1 or chain[-1].index in recording.returned or not readers[0].is_module:
            break
        chain.append(readers[0])
        if isinstance(readers[0].target, (RoutedLinear, RoutedConv2d)):
            return chain
    return [node]


def _activation(node: Node) -> str | None:
    if getattr(node.target, "approximate", "none") != "none":  # nn.GELU(approximate="tanh")
        return None
    return _ACTIVATIONS.get(kind_of(node))


def _as_conv(layer: Routed) -> nn.Conv2d:
    """The layer itself, or a linear layer as a 1 x 1 convolution on its weights."""
    if isinstance(layer, nn.Conv2d):
        return layer
    assert isinstance(layer, RoutedLinear)
    like = {"device": "meta", "dtype": layer.weight.dtype}
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, **like)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(layer.weight[:, :, None, None], requires_grad=False)
    conv.bias = layer.bias
    if layer.out_groups:
        conv.out_groups = layer.out_groups  # type: ignore[assignment]
    return conv
