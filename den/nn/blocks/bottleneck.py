"""The elastic bottleneck block, plain or with cardinality: 1x1, 3x3, 1x1 (ResNet-50, ResNeXt)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from den.nn.blocks.frozen import check_mode, check_use, release
from den.nn.blocks.shape import BlockShape
from den.nn.blocks.shortcut import Shortcut
from den.nn.folding import folded_conv, may_fold
from den.nn.initial import initialise
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, Route, RoutingPlan
from den_kernels.bottleneck import BottleneckWeights, add_bottleneck_
from den_kernels.building import FoldCache, norm_affine
from den_kernels.eager import refuse_tangents
from den_kernels.plan import route_for
from den_kernels.rows import gather_rows, pool_rows, scatter_rows_


@dataclass(frozen=True)
class BottleneckShape(BlockShape):
    """``in_channels -> width`` (1x1), ``width -> width`` (3x3, in ``cardinality`` groups), ``width -> channels`` (1x1).

    A level keeps whole cardinality groups, the first ones.
    """

    stride: int
    cardinality: int = 1

    @property
    def unit(self) -> int:
        return self.hidden // self.cardinality if self.cardinality > 1 else 1

    @property
    def size(self) -> int:
        return -(-self.in_size // self.stride)

    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        inputs = self.unit if self.cardinality > 1 else width
        return (
            (self.in_channels * width, self.in_size),
            (9 * width * inputs, self.size),
            (width * self.channels, self.size),
        )

    def build(self, levels: int, first: bool = False) -> "BottleneckBlock":
        return BottleneckBlock(self, levels, first=first)


class _Folded(NamedTuple):
    scale1: Tensor | None  # [in_channels], at least float32; None where there is no bn1
    shift1: Tensor | None
    conv1: DynamicConv2d  # bn2 folded in
    conv2: DynamicConv2d  # bn3 folded in


class BottleneckBlock(nn.Module):
    """The block ``shortcut(x) + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x))))))))`` of elastic hidden channels.

    Input [B, in_channels, H, W] -> output [B, channels, ceil(H / stride), ceil(W / stride)]; both widths between the
    convolutions are the hidden one, and an instance at level ``l`` uses the first ``l`` groups of both. conv2 has the
    stride and the cardinality (He et al., CVPR 2016; Xie et al., CVPR 2017), pre-activation as the basic block; level
    0 is exactly the shortcut, and the batch norms see the instances that :class:`den.nn.blocks.ElasticBlock`'s see.

    In eval mode without gradients bn2 and bn3 are folded into the convolutions, and on a CPU only the instances above
    level 0 are read: at level 0 an instance costs nothing. Where :mod:`den_kernels.bottleneck` runs, that is one call.

    Args:
        shape: channels, stride and cardinality.
        first: the network's first block, whose input is activated already: no bn1, no ReLU before conv1.

    Raises:
        ValueError: a stride other than 1 and 2, fewer channels out than in, levels that the hidden channels or their
            cardinality groups cannot be cut into; ``x`` of other channels, without pixels or on another device; a route
            of other groups or instances.
        TypeError: ``x`` of another dtype than a frozen block.
    """

    def __init__(self, shape: BottleneckShape, levels: int, *, first: bool = False) -> None:
        super().__init__()
        groups, width = shape.groups(levels), shape.hidden
        self.stride = shape.stride
        self.shortcut = Shortcut(shape.in_channels, shape.channels, shape.stride, "BottleneckBlock")
        self.bn1 = None if first else DynamicBatchNorm2d(shape.in_channels, groups=1)
        self.conv1 = DynamicConv2d(shape.in_channels, width, 1, bias=False, out_groups=groups)
        self.bn2 = DynamicBatchNorm2d(width, groups=groups)
        self.conv2 = DynamicConv2d(
            width, width, 3, shape.stride, 1, 1, shape.cardinality, False, out_groups=groups, in_groups=groups
        )
        self.bn3 = DynamicBatchNorm2d(width, groups=groups)
        self.conv3 = DynamicConv2d(width, shape.channels, 1, bias=False, in_groups=groups)
        for conv in (self.conv1, self.conv2, self.conv3):
            initialise(conv)
        self.to(memory_format=torch.channels_last)
        self._folded: FoldCache[_Folded | BottleneckWeights] = FoldCache()
        self._frozen: BottleneckWeights | None = None

    def layers(self) -> tuple[tuple[DynamicConv2d, DynamicBatchNorm2d | None], ...]:
        """The convolutions in order, each with the batch norm (and ReLU) that follows it."""
        return (self.conv1, self.bn2), (self.conv2, self.bn3), (self.conv3, None)

    def forward(self, x: Tensor, route: Route | None = None, *, inplace: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: [B, in_channels, H, W].
            route: levels of the instances; None: all hidden channels for all.
            inplace: the result may be written over ``x`` (only done for inference).
        """
        frozen = self._frozen is not None
        if frozen:
            check_use(self, route)
        if route is not None and (frozen or (may_fold(self) and x.dtype == self.conv1.weight.dtype)):
            return self._infer(x.contiguous(memory_format=torch.channels_last), route, inplace)
        y = self.shortcut(x) + self.residual(x, route)
        # Another thread may have frozen the block meanwhile, its weights are gone then.
        return y if self._frozen is None else self.forward(x, route, inplace=inplace)

    def residual(self, x: Tensor, route: Route | None = None) -> Tensor:
        """All but the shortcut, over the selected channels; 0 for instances at level 0."""
        if self.bn1 is not None:
            x = self.bn1(x, None if route is None else route.active(), relu=True)
        hidden = self.bn2(self.conv1(x, route), route, relu=True)
        hidden = self.bn3(self.conv2(hidden, route), route, relu=True)
        return self.conv3(hidden, route)

    def _infer(self, x: Tensor, route: Route, inplace: bool) -> Tensor:
        _, C, H, W = x.shape
        weight = self.conv1.weight
        if self.conv1.in_channels != C or H == 0 or W == 0 or x.device != weight.device:
            wanted = f"[B, {self.conv1.in_channels}, H, W] with H and W of at least 1 on {weight.device}"
            raise ValueError(f"BottleneckBlock: x must be {wanted}, got {list(x.shape)} on {x.device}")
        if x.dtype != weight.dtype:
            raise TypeError(f"BottleneckBlock: x must be {weight.dtype} as the weights are, got {x.dtype}")
        refuse_tangents("BottleneckBlock", x)
        route = route_for(x, route, len(self.conv1.out_groups), "BottleneckBlock")
        out = x if inplace and self.shortcut.is_identity else pool_rows(x, self.conv3.out_channels, self.stride)
        folded = self._frozen or self.folded()
        if isinstance(folded, BottleneckWeights):
            return add_bottleneck_(out, x, route, folded)
        if not x.is_cpu:
            x = x if self.bn1 is None else self.bn1(x, route.active(), relu=True)
            return out.add_(self._branch(x, route, folded))
        rows, route = _users(route)
        if len(rows):
            x = gather_rows(x, rows, x.shape[1], folded.scale1, folded.shift1, self.bn1 is not None)
            scatter_rows_(out, self._branch(x, route, folded), rows, accumulate=True)
        return out

    def _branch(self, x: Tensor, route: Route, folded: _Folded) -> Tensor:
        hidden = folded.conv2(folded.conv1(x, route).relu_(), route).relu_()
        return self.conv3(hidden, route)

    def folded(self) -> _Folded | BottleneckWeights:
        """Weights with the batch norms folded (eval mode), from the cache while nothing they depend on changed.

        As the CPU's kernel reads them, where that runs.
        """
        layers = bn1, conv1, bn2, _, bn3, _ = self.bn1, self.conv1, self.bn2, self.conv2, self.bn3, self.conv3
        kept = tuple(layer for layer in layers if layer is not None)
        made = self._folded.of(kept, self._fold, conv1.out_groups, bn1 and bn1.eps, bn2.eps, bn3.eps)
        return self._frozen or made  # frozen by another thread meanwhile: what was read may be gone

    def _fold(self) -> _Folded | BottleneckWeights:
        affine = (None, None) if self.bn1 is None else norm_affine(self.bn1, self.conv1.weight.dtype)
        conv1, conv2 = folded_conv(self.conv1, self.bn2), folded_conv(self.conv2, self.bn3)
        packed = BottleneckWeights.pack(affine, conv1, conv2, self.conv3, self.conv1.out_groups)
        return packed or _Folded(*affine, conv1, conv2)

    def freeze(self) -> None:
        """Keep the weights only as the kernel reads them, for good: see :meth:`DeepElasticNetwork.freeze`."""
        weights = self.folded()
        if isinstance(weights, BottleneckWeights):
            self._frozen = weights  # before the weights go: see forward() and folded()
            self._folded.clear()
            release(self, (self.conv1, self.conv2, self.conv3))

    def train(self, mode: bool = True) -> "BottleneckBlock":
        if self._frozen is not None:
            check_mode(self, mode)
        self._folded.clear()
        return super().train(mode)


def _users(route: Route) -> tuple[Tensor, Route]:
    """The instances above level 0, int32 [n], and their route as a batch of their own. Reads a CPU route's counts."""
    rows = route.order[: int((route.levels > 0).sum())].contiguous()
    if route.mask is None:
        return rows, RoutingPlan.from_levels(route.levels[rows.long()][:, None], route.groups)[0]
    return rows, RoutingPlan.from_masks(route.mask[rows.long()][:, None])[0]
