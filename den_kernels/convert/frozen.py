"""Blocks of a frozen model: one op each, or one for several in a row, on weights that were folded once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .._residual_cpu import run_direct
from ..bottleneck_weights import BottleneckWeights
from ..dynamic_bottleneck import dynamic_bottleneck
from ..dynamic_inverted_residual import dynamic_inverted_residual
from ..dynamic_residual import dynamic_residual
from ..dynamic_trunk import TrunkWeights, dynamic_trunk
from ..eager import in_onnx_export, runs_eagerly
from ..inverted_residual_weights import InvertedResidualWeights
from ..plan import Route, RoutingPlan
from ..projection import Projection
from ..residual_weights import ResidualWeights
from .carrier import Carrier
from .extract import plain_layer
from .frozen_conv import FrozenConv2d
from .fused import Branch
from .inverted import InvertedBranch
from .layers import Routed

Weights = ResidualWeights | BottleneckWeights | InvertedResidualWeights


class FrozenBlock(nn.Module):
    """A block of a frozen model, in the place of the block that it was.

    weights: one of all levels, or one of each level 1..G, its channels alone, where norms have statistics for each.
    """

    def __init__(
        self, branch: Branch | InvertedBranch, groups: int, weights: Sequence[Weights], may_write: bool
    ) -> None:
        super().__init__()
        conv = branch.convs[0]
        self.carrier: Carrier = conv.carrier
        self.block, self.groups, self.weights = conv.block, groups, tuple(weights)
        self.shortcut = branch.shortcut
        self.head = branch.head if branch.shortcut is not None else None  # else it is in the weights
        self.reads_head = branch.reads_head
        self.direct = all(each.direct is not None for each in weights)
        self.copies = branch.head is None and not branch.activated  # a level 0 is relu(x), and x no output of a ReLU
        self.skip, self.may_write = branch.skip, may_write and branch.skip
        self.eval()

    @property
    def joins(self) -> bool:
        """True for a block that can be one of several in a call: it keeps its map's shape, or has a `projection`."""
        [weights, *others] = self.weights
        if others or isinstance(weights, InvertedResidualWeights):
            return False
        if self.shortcut is not None:
            return self.head is None and self.projection is not None
        return not self.copies and weights.stride == 1 and weights.out_channels == weights.first.shape[1]

    @cached_property
    def projection(self) -> Projection | None:
        """The one convolution that the shortcut is, proved on random maps; None where it is anything else."""
        modules = [] if self.shortcut is None else list(self.shortcut.modules())
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        if self.shortcut is None or len(convs) != 1 or any(m._forward_hooks or m._forward_pre_hooks for m in modules):
            return None
        [conv] = convs
        found = Projection.of(conv, getattr(conv, "packed", None)) if type(conv) in (nn.Conv2d, FrozenConv2d) else None
        x = torch.randn(2, conv.in_channels, 9, 7, generator=torch.Generator().manual_seed(0)).to(conv.weight)
        with torch.no_grad():
            return found if found is not None and torch.equal(self.shortcut(x), conv(x)) else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C_out, H_out, W_out], at the levels that are set; may write over x."""
        a = x if self.head is None else torch.relu(self.head(x))
        refuse_onnx(x)
        route = self.carrier.route(self.block, x)
        if len(self.weights) > 1 and route.mask is not None:
            raise ValueError(
                "levels: levels of a frozen model with statistics for each level must be integers, got masks"
            )
        if self.shortcut is None:
            out, own = x, self.may_write
        else:
            out = self.shortcut(a if self.reads_head else x)
            own = out.data_ptr() not in (x.data_ptr(), a.data_ptr()) if runs_eagerly(x) else False
        if self.direct and own and not self.copies and x.is_cpu and runs_eagerly(x):
            return self._onto(a, route, out)
        if len(self.weights) > 1:
            return self._by_levels(a, route, out if self.skip else None)
        return _op(self.weights[0])(a, route, self.weights[0], None if out is x and not self.copies else out)

    def _onto(self, a: Tensor, route: Route, out: Tensor) -> Tensor:
        """The branch of a [B, C, H, W] added to `out` [B, C_out, H_out, W_out], ours, which holds the shortcut."""
        a = a.contiguous(memory_format=torch.channels_last)
        out = out.contiguous(memory_format=torch.channels_last)
        for weights, own in self._parts(route):
            run_direct(a, own, weights, out, True)
        if self.weights[0].relu and self.shortcut is not None:  # else it is the output of a ReLU already
            for instance in route.order[int((route.levels > 0).sum()) :].tolist():
                out[instance].relu_()
        return out

    def _by_levels(self, a: Tensor, route: Route, out: Tensor | None) -> Tensor:
        """As `_onto`, in new memory, by the ops: each level's instances keep the result of their own weights."""
        parts = self._parts(route, all=True)
        result, *others = (_op(weights)(a, own, weights, out) for weights, own in parts)  # level 0: the shortcut
        for level, made in enumerate(others, 2):
            result = torch.where((route.levels == level)[:, None, None, None], made, result)
        return result

    def _parts(self, route: Route, all: bool = False) -> list[tuple[Weights, Route]]:
        """The weights of each level, with a route of one group for its instances; `all`: of those without any, too."""
        if len(self.weights) == 1:
            return [(self.weights[0], route)]
        parts = []
        ends = [] if all else route.offsets.tolist()
        for level, weights in enumerate(self.weights, 1):
            chosen = (route.levels == level).int()
            if all:
                parts.append((weights, RoutingPlan.from_levels(chosen[:, None], 1)[0]))
            elif (count := ends[self.groups - level + 1] - (start := ends[self.groups - level])) > 0:
                order = torch.cat(
                    [route.order[start : start + count], route.order[:start], route.order[start + count :]]
                )
                parts.append(
                    (weights, Route(chosen, order, torch.tensor([0, count, len(order)], dtype=torch.int32), 1))
                )
        return parts


def _op(weights: Weights) -> Any:
    if isinstance(weights, InvertedResidualWeights):
        return dynamic_inverted_residual
    return dynamic_residual if isinstance(weights, ResidualWeights) else dynamic_bottleneck


class FrozenRow(nn.Module):
    """Blocks in a row that join, one call of `dynamic_trunk`; may write over its input.

    Where one of them or a module in it has hooks, they are called one by one, so that the hooks see them.
    """

    def __init__(self, blocks: Sequence[FrozenBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.carrier, self.numbers = blocks[0].carrier, range(blocks[0].block, blocks[-1].block + 1)
        weights, shortcuts = (each.weights[0] for each in blocks), (each.projection for each in blocks)
        self.weights = TrunkWeights(tuple(weights), shortcuts=tuple(shortcuts))  # type: ignore[arg-type]
        self.watched = tuple(self.blocks.modules())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.watched):
            for block in self.blocks:
                x = block(x)
            return x
        refuse_onnx(x)
        return dynamic_trunk(x, self.carrier.plan_of(self.numbers, x), self.weights)


def refuse_onnx(x: Tensor) -> None:
    """Raise RuntimeError while torch.onnx.export records: ONNX has no such ops, and the plain weights are gone."""
    if not runs_eagerly(x) and in_onnx_export():
        raise RuntimeError(
            "freeze: torch.onnx.export must be given a model that is not frozen, WithLevels(model), or "
            "extract(model, structure), got one whose weights are kept only as our kernels read them"
        )


def fold_branch(branch: Branch | InvertedBranch, groups: int) -> list[Weights]:
    """The weights of a block for all levels, or one for each level where its norms have statistics for each.

    Raises ValueError or TypeError for shapes that no op takes.
    """
    if all(getattr(norm, "level_mean", None) is None for norm in branch.norms):
        return [branch.fold().released()]
    made = []
    for level in range(1, groups + 1):
        convs = [plain_layer(conv, level, groups) for conv in branch.convs]
        norms = [plain_layer(norm, level, groups) if isinstance(norm, Routed) else norm for norm in branch.norms]
        norms = [norm[0] if isinstance(norm, nn.Sequential) else norm for norm in norms]  # an activation behind it
        made.append(branch.fold(convs, norms).released())
    return made
