"""Converted blocks that run as one op at inference: `dynamic_residual` for basic blocks, `dynamic_bottleneck`, and
`dynamic_inverted_residual` (inverted.py)."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..bottleneck_weights import BottleneckWeights
from ..dynamic_bottleneck import dynamic_bottleneck
from ..dynamic_residual import dynamic_residual
from ..eager import runs_eagerly
from ..fold_cache import FoldCache
from ..residual_weights import ResidualWeights
from .carrier import Selection
from .inverted import InvertedBranch
from .layers import RoutedBatchNorm2d, RoutedConv2d

BASIC, BOTTLENECK = "dynamic_residual", "dynamic_bottleneck"


@dataclass(eq=False)
class Branch:
    """The modules of a block of a known form, and what its shortcut reads."""

    convs: tuple[RoutedConv2d, ...]
    """Two of a basic block, three of a bottleneck."""
    norms: tuple[RoutedBatchNorm2d, ...]
    """Behind each convolution; of a pre-activation block behind each but the last."""
    head: nn.BatchNorm2d | None
    """The norm of a pre-activation block that stands first; None of a post-activation block."""
    shortcut: nn.Module | None
    """None: the block's input."""
    reads_head: bool
    """The shortcut reads relu(head(x))."""
    activated: bool
    """The block's input is the output of a ReLU."""
    skip: bool = True
    """The branch is added to a shortcut."""
    _cache: FoldCache[Any] = field(default_factory=FoldCache)

    @property
    def post_activation(self) -> bool:
        return self.head is None

    @property
    def kernel(self) -> str:
        return BASIC if len(self.convs) == 2 else BOTTLENECK

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (*self.convs, *self.norms, *([] if self.head is None else [self.head]))

    def weights(self) -> Any:
        """The parameters as the op takes them, folded once; None where the op does not run."""
        try:
            return self._cache.of(self.modules, self.fold)
        except (ValueError, TypeError):  # shapes that the op does not take
            return None

    def __call__(self, x: Tensor, selection: Selection, weights: Any) -> Tensor:
        """The block of x [B, C, H, W] at inference."""
        a = x if self.head is None or self.shortcut is None else torch.relu(self.head(x))
        shortcut = None
        if self.shortcut is not None:
            shortcut = self.shortcut(a if self.reads_head else x)
        elif self.head is None and not self.activated:
            shortcut = x
        op: Any = dynamic_residual if len(self.convs) == 2 else dynamic_bottleneck
        return op(a, selection.hidden, weights, shortcut)

    def fold(self, convs: Any = None, norms: Any = None) -> ResidualWeights | BottleneckWeights:
        """The weights of the block, or of one with other convolutions and norms in the place of its own.

        Raises ValueError or TypeError for shapes that the op does not take.
        """
        (conv1, *convs), norms = convs or self.convs, norms or self.norms
        if not self.post_activation:
            norms = (self.head if self.shortcut is None else None, *norms)
        layers = [conv1, *chain.from_iterable(zip(norms, convs, strict=False)), norms[-1]]
        if len(convs) == 1:
            return ResidualWeights.fold(*layers, post_activation=self.post_activation)
        return BottleneckWeights.fold(*layers, post_activation=self.post_activation).released()


class FusedForward:
    """The forward of a block: one op at inference where levels are set, else the block's own."""

    def __init__(self, block: nn.Module, branch: Branch | InvertedBranch) -> None:
        self.block, self.branch = block, branch
        self.inside = tuple(module for module in block.modules() if module is not block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        selection = self._selection(args, kwargs)
        weights = None if selection is None else self.branch.weights()
        if weights is None or selection is None:
            return type(self.block).forward(self.block, *args, **kwargs)
        return self.branch(args[0], selection, weights)

    def _selection(self, args: tuple, kwargs: dict[str, Any]) -> Selection | None:
        """What the block's instances use, if the op may run."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(args) != 1 or kwargs:
            return None
        [x], conv = args, self.branch.convs[0]
        if not isinstance(x, Tensor) or x.dtype != conv.weight.dtype or not runs_eagerly(x):
            return None
        if torch.is_autocast_enabled(x.device.type) or any(_needs_layers(module) for module in self.inside):
            return None
        return conv.carrier.selection(conv.block, by_op=True)


def _needs_layers(module: nn.Module) -> bool:
    """True where a module of a block does what the op does not: hooks see its results, it trains or knows levels."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return isinstance(module, nn.BatchNorm2d) and (module.training or getattr(module, "level_mean", None) is not None)


def unfused(model: nn.Module) -> nn.Module:
    """The model itself, with the blocks' own forwards."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.__dict__["forward"]
    return model
