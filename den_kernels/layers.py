"""`DynamicConv2d`: a drop-in `nn.Conv2d` whose instances may use only some of its channel groups."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._conv_arguments import group_sizes
from ._conv_direct import pack
from .dynamic_conv import convolve
from .eager import as_fx_leaf, refuse_script
from .fold_cache import FoldCache
from .plan import Route

_ARGUMENTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class DynamicConv2d(nn.Conv2d):
    """`nn.Conv2d` with channel groups: the same parameters and state_dict, and `conv(x)` is the same computation.

    `conv(x, selection)` computes for each instance only the groups that it selected: integer levels [B] in 0..G (the
    first groups), a bool mask [B, G], or a Route, shared with other layers. See `dynamic_conv2d` for what holds then.

    out_groups, in_groups: the channel groups of each side, as an int (equal groups) or their sizes. Weights lie in
    memory as those of `nn.Conv2d`; channels-last ones train faster, and so do maps (`.to(memory_format=...)`). Raises
    ValueError where groups do not add up to the channels, do not lie on the boundaries of `groups` (cardinality), or
    differ in number between the sides.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        out_groups: int | Sequence[int] | None = None,
        in_groups: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        self.out_groups = group_sizes(out_groups, out_channels, "out_groups", groups)
        self.in_groups = group_sizes(in_groups, in_channels, "in_groups", groups)
        if self.out_groups and self.in_groups and len(self.out_groups) != len(self.in_groups):
            raise ValueError(
                f"DynamicConv2d: in_groups must have {len(self.out_groups)} groups as out_groups, "
                f"got {len(self.in_groups)}"
            )
        # The weight as the direct convolution reads it, by dtype: autocast computes in another than the weight's.
        self._packed: dict[torch.dtype, FoldCache[Tensor]] = {}

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        out_groups: int | Sequence[int] | None = None,
        in_groups: int | Sequence[int] | None = None,
    ) -> Self:
        """A dynamic convolution that shares the parameters of `conv`, in its memory format; hooks stay behind.

        Raises TypeError unless `conv` computes as `nn.Conv2d` does, with parameters of its own (not lazy, not
        parametrized).
        """
        plain = (
            isinstance(conv, nn.Conv2d)
            and type(conv)._conv_forward is nn.Conv2d._conv_forward
            and type(conv).forward in (nn.Conv2d.forward, cls.forward)
            and isinstance(conv._parameters.get("weight"), nn.Parameter)
            and not nn.parameter.is_lazy(conv.weight)
        )
        if not plain:
            raise TypeError(
                f"DynamicConv2d.from_conv: conv must be an initialized nn.Conv2d, got {type(conv).__name__}"
            )
        same: dict[str, Any] = {name: getattr(conv, name) for name in _ARGUMENTS}
        same.update(bias=conv.bias is not None, device="meta", dtype=conv.weight.dtype)
        dynamic = cls(**same, out_groups=out_groups, in_groups=in_groups)
        dynamic.weight, dynamic.bias = conv.weight, conv.bias
        return dynamic.train(conv.training)

    def forward(self, x: Tensor, selection: Route | Tensor | None = None) -> Tensor:
        """x: [B, C_in, H, W]; selection: levels [B], mask [B, G], Route, or None for the whole convolution."""
        if not isinstance(x, Tensor):
            return as_fx_leaf(self, x, selection)
        if selection is None:
            return super().forward(x)
        if not self.out_groups and not self.in_groups:
            raise ValueError("DynamicConv2d: out_groups or in_groups must be set to use a selection, got None for both")
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        return convolve(
            x, self.weight, self.bias, selection, self.stride, padding, self.dilation, self.groups,
            self.out_groups, self.in_groups, self._packed_weight,
        )  # fmt: skip

    def _packed_weight(self, dtype: torch.dtype) -> Tensor:
        cache = self._packed.get(dtype) or self._packed.setdefault(dtype, FoldCache())
        return cache.get((self.weight,), lambda: pack(self.weight.detach().to(dtype), self.in_groups), self.in_groups)

    def train(self, mode: bool = True) -> Self:
        for cache in self._packed.values():
            cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        sides = (f", {name}={sizes}" for name in ("out_groups", "in_groups") if (sizes := getattr(self, name)))
        return super().extra_repr() + "".join(sides)
