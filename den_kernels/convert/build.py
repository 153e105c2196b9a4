"""The routed layers of a region, in the place of its modules."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .carrier import Carrier
from .layers import Routed, RoutedBatchNorm2d, RoutedConv2d, RoutedLinear
from .record import evaluating
from .region import Layer, Region
from .rules import NORMS, Unfit, describe
from .spaces import Space


def routed_layers(
    region: Region, shares: Sequence[float], carrier: Carrier, block: int, modules: Mapping[int, nn.Module]
) -> dict[int, Routed]:
    """A layer that knows its levels for each of `modules`, by node, that shares the module's parameters.

    Raises Unfit for modules that compute something else than their class does.
    """
    made = {}
    for layer in region.layers:
        try:
            routed = _routed(layer, modules[layer.node.index], shares)
        except (TypeError, ValueError) as why:
            raise Unfit(f"{describe(layer.node)} cannot be replaced: {why}") from None
        made[layer.node.index] = routed.attach(carrier, block, layer.closes)
    return made


def _routed(layer: Layer, module: Any, shares: Sequence[float]) -> Routed:
    def sizes(space: Space | None, channels: int) -> tuple[int, ...]:
        return () if space is None else space.sizes(channels, shares)

    if isinstance(module, nn.Conv2d):
        outs, ins = sizes(layer.writes, module.out_channels), sizes(layer.reads, module.in_channels)
        return RoutedConv2d.from_conv(module, out_groups=outs or None, in_groups=ins or None)
    if isinstance(module, nn.Linear):
        outs, ins = sizes(layer.writes, module.out_features), sizes(layer.reads, module.in_features)
        return RoutedLinear.from_linear(module, outs, ins)
    return plain_norm(module, sizes(layer.writes, module.num_features) or None)


def plain_norm(module: nn.BatchNorm2d | nn.SyncBatchNorm, groups: Sequence[int] | None = None) -> RoutedBatchNorm2d:
    """A norm that shares the tensors of `module`, with the modules that this holds behind it as children.

    Raises TypeError for a norm of another package that computes something else.
    """
    norm = RoutedBatchNorm2d.from_norm(module, groups)
    for name, behind in module.named_children():
        norm.add_module(name, behind)
    _check_norm(norm, module)
    return norm


@torch.no_grad()
def _check_norm(norm: RoutedBatchNorm2d, module: nn.Module) -> None:
    """Raises TypeError where a norm of another package is not a batch norm and its own modules behind it."""
    if type(module) in NORMS:
        return
    first = next(iter(module.parameters()), torch.empty(0))
    x = torch.randn(2, norm.num_features, 3, 3, device=first.device, dtype=first.dtype)
    with evaluating(module):
        wanted = module(x)
    y = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    for behind in norm.children():
        with evaluating(behind):
            y = behind(y)
    if not torch.equal(y, wanted):
        raise TypeError(f"{type(module).__name__} is no batch norm with its own modules behind it")
