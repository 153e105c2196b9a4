"""The layers that a converted model has in the place of its own: they ask a carrier for their levels."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._conv_direct import pack
from .._geometry import operands, settle
from ..dynamic_conv import convolve
from ..eager import as_fx_leaf
from ..fold_cache import FoldCache
from ..layers import DynamicBatchNorm2d, DynamicConv2d
from ..plan import Route, channels_of
from .carrier import Carrier, Selection


class Routed(nn.Module):
    """A layer of block number `block` of the model whose levels are in `carrier`."""

    carrier: Carrier
    block: int
    closes: bool
    """Its result is 0 where the block's level is 0."""

    def attach(self, carrier: Carrier, block: int, closes: bool) -> Self:
        self.carrier, self.block, self.closes = carrier, block, closes
        return self

    def _selection(self) -> Selection | None:
        return self.carrier.selection(self.block)

    def _closed(self, y: Tensor, selection: Selection) -> Tensor:
        """y [B, ...], 0 where the branch is not in use."""
        if not self.closes or (selection.used and not is_compiling()):
            return y
        active = (selection.active.levels > 0).view(-1, *[1] * (y.ndim - 1))
        return torch.where(active, y, 0)


class RoutedConv2d(Routed, DynamicConv2d):
    """A `DynamicConv2d` at the levels of its block."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not isinstance(x, Tensor):
            return as_fx_leaf(self, x)
        selection = self._selection()
        if selection is None:
            return nn.Conv2d.forward(self, x)
        return self._closed(DynamicConv2d.forward(self, x, selection.hidden), selection)


class RoutedLinear(Routed, nn.Linear):
    """A linear layer at the levels of its block: over the last axis of x [B, ..., C], as a 1x1 convolution."""

    out_groups: tuple[int, ...] = ()
    in_groups: tuple[int, ...] = ()

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._packed: FoldCache[Tensor] = FoldCache()

    @classmethod
    def from_linear(cls, linear: nn.Linear, out_groups: Sequence[int], in_groups: Sequence[int]) -> Self:
        """One that shares the parameters of `linear`."""
        own = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        own.weight, own.bias = linear.weight, linear.bias
        own.out_groups, own.in_groups = tuple(out_groups), tuple(in_groups)
        return own.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return as_fx_leaf(self, x)
        selection = self._selection()
        if selection is None:
            return F.linear(x, self.weight, self.bias)
        maps, weight, bias = operands(as_map(x), self.weight[:, :, None, None], self.bias, 1)
        convolution = settle(weight.shape, 1, 0, 1, 1, self.out_groups, self.in_groups)
        y = convolve(maps, weight, bias, selection.hidden, *convolution, self._packed_weight)
        y = y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)
        return self._closed(y, selection)

    def _packed_weight(self, dtype: torch.dtype) -> Tensor:
        def packed() -> Tensor:
            return pack(self.weight.detach().to(dtype)[:, :, None, None], self.in_groups)

        return self._packed.get((self.weight,), packed, self.in_groups, dtype)

    def train(self, mode: bool = True) -> Self:
        self._packed.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, out_groups={self.out_groups}, in_groups={self.in_groups}"


def as_map(x: Tensor) -> Tensor:  # [B, ..., C] -> [B, C, H, W]
    """x as a channels-last map: its own rows where it has four axes, else one row of all pixels."""
    return (x if x.ndim == 4 else x.reshape(x.shape[0], 1, -1, x.shape[-1])).permute(0, 3, 1, 2)


class RoutedBatchNorm2d(Routed, DynamicBatchNorm2d):
    """A `DynamicBatchNorm2d` at the levels of its block, and behind it the activation that the norm held, if any.

    Of the tail of a branch (`closes`) all channels are one group, which the instances above level 0 use.
    `level_mean`, `level_var`: [G, C], statistics for each level, once `recalibrate` has measured them; `running_mean`
    and `running_var` are then those of level G.
    """

    level_mean: Tensor | None
    level_var: Tensor | None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_buffer("level_mean", None)
        self.register_buffer("level_var", None)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not isinstance(x, Tensor):
            return as_fx_leaf(self, x)
        selection = self._selection()
        if selection is None:
            y = DynamicBatchNorm2d.forward(self, x)
        elif self.level_mean is not None and not self.training:
            y = self._at_levels(x, selection)
        else:
            y = DynamicBatchNorm2d.forward(self, x, self._route(selection))
        for behind in self.children():
            y = behind(y)
        return y

    def _route(self, selection: Selection) -> Route:
        return selection.active if self.closes else selection.hidden

    def _at_levels(self, x: Tensor, selection: Selection) -> Tensor:
        """Each instance normalised with the statistics of its level."""
        assert self.level_mean is not None
        assert self.level_var is not None
        row = (selection.hidden.levels.long() - 1).clamp(min=0)
        scale = (self.level_var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.level_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        y = x * scale[row][:, :, None, None].to(x.dtype) + shift[row][:, :, None, None].to(x.dtype)
        channels = channels_of(self._route(selection).selection(), self.groups)
        return torch.where(channels[:, :, None, None], y, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the statistics of levels from a state_dict that holds them."""
        for name in ("level_mean", "level_var"):
            if getattr(self, name) is None and (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(stored, device=_device(self)))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _device(norm: nn.BatchNorm2d) -> torch.device | None:
    return None if norm.running_mean is None else norm.running_mean.device
