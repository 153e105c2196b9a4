"""Hidden channels in the order of their importance, so that low levels keep the important ones."""

import torch
from torch import Tensor, nn

from .region import Layer, Region
from .spaces import Space


@torch.no_grad()
def sort_by_l1(region: Region) -> None:
    """Sort the units of each space of a region, the important ones first; the model computes the same function.

    The importance of a channel is the L1 norm of the weights that read it (Cai et al., Once-for-All, ICLR 2020), times
    the size of its batch norm's weight; of a unit the sum over its channels. All layers of the space are reordered
    alike. The outputs of a depthwise convolution that stands first keep their order, which is that of its inputs.
    """
    for space in {layer.reads for layer in region.layers if layer.reads}:
        if not any(_is_bound(layer, space) for layer in region.layers):
            order = _importance(space, region).argsort(descending=True, stable=True)
            for layer in region.layers:
                _reorder(layer, space, order)


def _is_bound(layer: Layer, space: Space) -> bool:
    """True where outputs follow inputs that keep their order: of a depthwise convolution that stands first."""
    return layer.writes is space and layer.reads is not space and getattr(layer.node.target, "groups", 1) > 1


def _importance(space: Space, region: Region) -> Tensor:
    """Sum of the absolute weights that read a unit, times the absolute scales of norms on it: float64 [units]."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in region.layers:
        if layer.reads is space and layer.writes is not space and layer.node in region.path:
            weight = layer.node.target.weight
            total = total + _by_unit(weight.abs().transpose(0, 1).flatten(1).sum(1), space)
    for layer in region.layers:
        module = layer.node.target
        if layer.writes is space and not isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight is not None:
            total = total * _by_unit(module.weight.abs(), space)
    return total


def _by_unit(values: Tensor, space: Space) -> Tensor:
    return values.view(space.units, -1).sum(1)


def _reorder(layer: Layer, space: Space, order: Tensor) -> None:
    """Permute what a layer holds of a space."""
    module = layer.node.target
    if layer.writes is space:
        own = [module.weight, module.bias]
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            own += [module.running_mean, module.running_var]
        for tensor in own:
            if tensor is not None:
                tensor.copy_(tensor[_channels(order, tensor.shape[0])])
    if layer.reads is space and getattr(module, "groups", 1) == 1:
        module.weight.copy_(module.weight[:, _channels(order, module.weight.shape[1])])


def _channels(order: Tensor, channels: int) -> Tensor:
    """The channels of units in that order."""
    step = channels // len(order)
    return (order[:, None] * step + torch.arange(step, device=order.device)).flatten()
