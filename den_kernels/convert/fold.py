"""Batch norms of a copy for inference, folded into the convolutions before them."""

from collections.abc import Collection

import torch
from torch import nn

from ..folding import fold_norm
from .build import plain_norm
from .layers import RoutedBatchNorm2d, RoutedConv2d
from .record import Node, Recording

_CONVOLUTIONS = (nn.Conv2d, RoutedConv2d)


@torch.no_grad()
def fold_norms(model: nn.Module, recording: Recording, taken: Collection[nn.Module]) -> int:
    """Fold each batch norm that alone reads a convolution into it, in place; the number of those.

    recording: of the model. taken: modules that stay as they are. Norms that `recalibrate` gave statistics for each
    level stay as well, and modules that run or stand several times, have hooks or give what the model returns.
    """
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    kept = {id(module) for module in taken}
    folded = 0
    for node in recording.nodes:
        pair = _pair(recording, node)
        if pair is None or any(places.count(id(m)) > 1 or id(m) in kept or _is_watched(m) for m in pair):
            continue
        conv, norm = pair
        try:
            plain = norm if isinstance(norm, RoutedBatchNorm2d) else plain_norm(norm)
        except TypeError:  # it computes something else behind the norm
            continue
        conv.weight.data, bias = fold_norm(conv.weight, conv.bias, plain)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        if isinstance(conv, RoutedConv2d) and isinstance(norm, RoutedBatchNorm2d):
            conv.closes = conv.closes or norm.closes
        [path] = [path for path, module in model.named_modules() if module is norm]
        behind = list(plain.children())
        model.set_submodule(path, nn.Sequential(*behind) if behind else nn.Identity())
        folded += 1
    return folded


def _pair(recording: Recording, node: Node) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The convolution that a node calls and the norm that alone reads its result."""
    if type(node.target) not in _CONVOLUTIONS or node.index in recording.returned:
        return None
    readers = recording.readers(node.index)
    norm = readers[0].target if len(readers) == 1 else None
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or len(readers[0].inputs) != 1:
        return None
    elastic = isinstance(node.target, RoutedConv2d) and bool(node.target.out_groups)
    if elastic != isinstance(norm, RoutedBatchNorm2d) and not getattr(norm, "closes", False):
        return None
    calls = (recording.calls[id(m)] for m in (node.target, norm))
    if any(count > 1 for count in calls) or getattr(norm, "level_mean", None) is not None:
        return None
    return node.target, norm


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
