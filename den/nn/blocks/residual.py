"""Residual blocks: the shortcut and the one op on folded weights that all of them have, and the elastic basic block."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks.shape import BlockShape
from den.nn.levels import level_groups
from den.nn.modules import initialise, lay_out_channels_last
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, ResidualWeights, Route, dynamic_residual, dynamic_residual_
from den_kernels.building import FoldCache, may_fold, refuse_transforms, stand_in


class Shortcut(nn.Module):
    """A residual block without its convolutions: 2x2 average pooling where `stride` is 2, zeros for new channels.

    [B, in_channels, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)]; an odd map's last row and column are
    pooled from what there is.

    Raises:
        ValueError: another stride, or fewer channels out than in.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, block: str) -> None:
        super().__init__()
        if stride not in (1, 2) or channels < in_channels:
            raise ValueError(
                f"{block}: stride must be 1 or 2 and channels at least in_channels,"
                f" got stride {stride}, channels {channels}, in_channels {in_channels}"
            )
        self.stride, self.new_channels = stride, channels - in_channels

    @property
    def is_identity(self) -> bool:
        """True where the shortcut is the identity: without its convolutions the block does nothing."""
        return self.stride == 1 and not self.new_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x


class FoldedBlock(nn.Module):
    """`shortcut(x) + residual(x, route)`, in eval mode without gradients one call of an op on folded weights.

    The weights are kept until a parameter or a running statistic changes. A subclass has the modules, `shortcut`,
    `conv1` and others, and says what its residual is and how its weights are folded.
    """

    conv1: DynamicConv2d
    shortcut: Shortcut
    op: Callable[..., Tensor]
    """Of x, a route and the folded weights; a static method, as `op_`, which may write over x."""
    op_: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._folded: FoldCache[Any] = FoldCache()
        self._frozen: Any = None  # the folded weights, where nothing else is left

    def layers(self) -> tuple[tuple[DynamicConv2d, DynamicBatchNorm2d | None], ...]:
        """The convolutions in order, each with the batch norm (and ReLU) that follows it."""
        raise NotImplementedError

    def residual(self, x: Tensor, route: Route | None = None) -> Tensor:
        """All but the shortcut, over the selected channels; 0 for instances at level 0."""
        raise NotImplementedError

    def _fold(self) -> Any:
        """The weights with the batch norms folded in."""
        raise NotImplementedError

    def forward(self, x: Tensor, route: Route | None = None, *, inplace: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: [B, in_channels, H, W].
            route: levels of the instances; None: all hidden channels for all.
            inplace: the result may be written over `x` (only done for inference).

        Returns:
            [B, channels, ceil(H / stride), ceil(W / stride)].
        """
        if self._frozen is not None:
            _check_use(self, route)
            return (self.op_ if inplace else self.op)(x, route, self._frozen)
        if route is not None and may_fold(self) and x.dtype == self.conv1.weight.dtype:
            return (self.op_ if inplace else self.op)(x, route, self.folded())
        y = self.shortcut(x) + self.residual(x, route)
        # Another thread may have frozen the block meanwhile, its weights are gone then.
        return y if self._frozen is None else self.forward(x, route, inplace=inplace)

    def folded(self) -> Any:
        """Weights with the batch norms folded (eval mode), from the cache while nothing they depend on changed."""
        if self._frozen is not None:
            return self._frozen
        modules = tuple([module for module in self._modules.values() if module is not None])
        made = self._folded.of(modules, self._fold, *self.settings())
        return self._frozen or made  # frozen by another thread meanwhile: what was read may be gone

    def settings(self) -> tuple[object, ...]:
        """Settings that folded weights depend on, besides tensors and the eps of norms."""
        return (self.conv1.out_groups,)

    def freeze(self) -> None:
        """Keep the weights only as the kernel reads them, for good: see `DeepElasticNetwork.freeze`."""
        weights = self.folded().released()
        if weights.direct is None:
            return
        self._frozen = weights  # before the weights go: see forward() and folded()
        self._folded.clear()
        _release(self, (conv for conv, _ in self.layers()))

    def train(self, mode: bool = True) -> Self:
        if self._frozen is not None and mode:
            raise ValueError(f"{type(self).__name__}: a frozen block must stay in eval mode, got train()")
        self._folded.clear()
        return super().train(mode)


def _release(block: nn.Module, convs: Iterable[nn.Conv2d]) -> None:
    """Give up the weights of `convs`, of which shape, dtype and device are left, and the block's `state_dict`."""
    for conv in convs:
        conv.weight = nn.Parameter(stand_in(conv.weight.detach()), requires_grad=False)
    block.register_state_dict_pre_hook(_refuse_to_save)


def _check_use(block: nn.Module, route: Route | None) -> None:
    """ValueError unless a frozen block is run as it can be, RuntimeError inside torch.func."""
    if route is None or block.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        raise ValueError(f"{type(block).__name__}: a frozen block must run with a route and without gradients")
    refuse_transforms(type(block).__name__)


def _refuse_to_save(*_: object) -> None:
    raise ValueError("state_dict: the network must not be frozen (its weights are gone), got a frozen one")


@dataclass(frozen=True)
class ResidualShape(BlockShape):
    """Two 3x3 convolutions, `in_channels -> width -> channels`, the first with the stride."""

    stride: int

    @property
    def size(self) -> int:
        return -(-self.in_size // self.stride)

    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        return (9 * self.in_channels * width, self.size), (9 * width * self.channels, self.size)

    def build(self, levels: int, first: bool = False) -> "ElasticBlock":
        return ElasticBlock(self.in_channels, self.channels, levels, stride=self.stride, first=first)


class ElasticBlock(FoldedBlock):
    """The block `shortcut(x) + conv2(relu(bn2(conv1(relu(bn1(x))))))` whose hidden channels are elastic.

    Input [B, in_channels, H, W] -> output [B, channels, ceil(H / stride), ceil(W / stride)], channels-last in memory.
    An instance at level `l` uses the first `l` groups of hidden channels and nothing else; at level 0 the block is
    exactly its shortcut: 2x2 average pooling where `stride` is 2, and zeros for the channels that are new. While
    training, bn1 takes its statistics from the instances above level 0 and bn2, channel by channel, from those that
    use the channel.

    In eval mode without gradients the block runs in one call on folded weights, which are kept until a parameter or
    a running statistic changes.

    Args:
        first: the network's first block, whose input is activated already: no bn1, no ReLU before conv1.

    Attributes:
        in_place: whether a CPU kernel reads weights of many channels where the parameters lie, so that a network that
            keeps its parameters holds them once: slower (WRN-32-4, bfloat16, B = 8: by a sixth; 31 MB at the peak in
            place of 43), and none of it in a frozen network. None: of float32 weights. bfloat16 needs AVX-512 BF16.
    """

    in_place: bool | None = None
    op, op_ = staticmethod(dynamic_residual), staticmethod(dynamic_residual_)

    def __init__(self, in_channels: int, channels: int, levels: int, *, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        self.shortcut = Shortcut(in_channels, channels, stride, "ElasticBlock")
        groups = level_groups(channels, levels)
        self.stride = stride
        self.bn1 = None if first else DynamicBatchNorm2d(in_channels, groups=1)
        self.conv1 = DynamicConv2d(in_channels, channels, 3, stride, padding=1, bias=False, out_groups=groups)
        self.bn2 = DynamicBatchNorm2d(channels, groups=groups)
        self.conv2 = DynamicConv2d(channels, channels, 3, padding=1, bias=False, in_groups=groups)
        for conv in (self.conv1, self.conv2):
            initialise(conv)
        lay_out_channels_last(self)

    def layers(self) -> tuple[tuple[DynamicConv2d, DynamicBatchNorm2d | None], ...]:
        """The convolutions in order, each with the batch norm (and ReLU) that follows it."""
        return (self.conv1, self.bn2), (self.conv2, None)

    def residual(self, x: Tensor, route: Route | None = None) -> Tensor:
        """`conv2(relu(bn2(conv1(relu(bn1(x))))))` over the selected channels; 0 for instances at level 0."""
        if self.bn1 is not None:
            x = self.bn1(x, None if route is None else route.active(), relu=True)
        hidden = self.bn2(self.conv1(x, route), route, relu=True)
        return self.conv2(hidden, route)

    def settings(self) -> tuple[object, ...]:
        return (*super().settings(), self.in_place)

    def _fold(self) -> ResidualWeights:
        stays = self.conv1.weight.dtype == torch.float32 if self.in_place is None else self.in_place
        return ResidualWeights.fold(self.conv1, self.bn1, self.conv2, self.bn2, copy=not stays)
