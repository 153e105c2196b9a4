"""`DynamicConv2d` and `DynamicBatchNorm2d`: layers of `torch.nn` whose instances may use only some channel groups."""

from collections.abc import Sequence
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ._conv_direct import Packed, pack
from ._geometry import Geometry, group_sizes, operands, settle
from .dynamic_conv import convolve
from .dynamic_norm import dynamic_batch_norm
from .eager import as_fx_leaf, is_profiled, refuse_script, runs_eagerly
from .fold_cache import FoldCache
from .plan import Route, as_route

Kind = TypeVar("Kind", bound=type[nn.Module])
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
        self._settled: tuple[tuple[Any, ...], tuple[Geometry, tuple[int, ...]]] | None = None
        if self.out_groups or self.in_groups:
            self._convolution(self.weight.shape)
        # The weight as the direct convolution reads it, by dtype: autocast computes in another than the weight's.
        self._packed: dict[torch.dtype, FoldCache[Packed]] = {}

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
        if self._packed and (y := self._ready(x, selection)) is not None:
            return y
        if not self.out_groups and not self.in_groups:
            raise ValueError("DynamicConv2d: out_groups or in_groups must be set to use a selection, got None for both")
        x, weight, bias = operands(x, self.weight, self.bias, self.groups)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return convolve(x, weight, bias, selection, *self._convolution(weight.shape), self._packed_weight)

    def _convolution(self, shape: torch.Size) -> tuple[Geometry, tuple[int, ...]]:
        """The layer's settings as `settle` gives them for a weight of this shape: checked when they have changed."""
        padding = self.padding if self.padding_mode == "zeros" else (0, 0)
        settings = shape, self.stride, padding, self.dilation, self.groups, self.out_groups, self.in_groups
        if self._settled is None or self._settled[0] != settings:
            self._settled = settings, settle(*settings)
        return self._settled[1]

    def _ready(
        self,
        x: Tensor,  # [B, C_in, H, W]
        selection: Route | Tensor,  # route, levels [B] or mask [B, G]
    ) -> Tensor | None:  # [B, C_out, H_out, W_out]
        """The result in inference by a weight that an earlier call has packed; None where `convolve` has to decide.

        Of a layer alone, what Python does before its kernel runs takes a tenth of the time.
        """
        weight, bias = self.weight, self.bias
        if x.dtype not in self._packed or weight.dtype != x.dtype or not (x.is_cpu and weight.is_cpu and x.ndim == 4):
            return None
        if not runs_eagerly(x, weight, bias) or torch.is_autocast_enabled("cpu") or is_profiled():
            return None
        if (run := self._packed_for(x.dtype).run) is None:
            return None
        route = selection
        if type(route) is not Route:
            if not (type(selection) is Tensor and selection.is_cpu):
                return None
            route = as_route(selection, len(self.out_groups) or len(self.in_groups), x.shape[0])
        return run(x, (route.groups, route.order, route.offsets, route.mask), bias)

    def _packed_for(self, dtype: torch.dtype) -> Packed:
        cache = self._packed.get(dtype) or self._packed.setdefault(dtype, FoldCache())
        settings = self.stride, self.padding, self.dilation, self.groups, self.out_groups, self.in_groups
        return cache.get((self.weight,), lambda: self._pack(dtype), *settings, self.padding_mode)

    def _pack(self, dtype: torch.dtype) -> Packed:
        weight = self.weight.detach().to(dtype)
        geometry, border = self._convolution(weight.shape)
        whole = self.padding_mode == "zeros" and not border
        return Packed(weight, pack(weight, self.in_groups), geometry if whole else None)

    def _packed_weight(self, dtype: torch.dtype) -> Tensor:
        return self._packed_for(dtype).weight

    def train(self, mode: bool = True) -> Self:
        for cache in self._packed.values():
            cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        sides = (f", {name}={sizes}" for name in ("out_groups", "in_groups") if (sizes := getattr(self, name)))
        return super().extra_repr() + "".join(sides)


def _group_of(norm: nn.Module) -> dist.ProcessGroup | Literal["world"] | None:
    """The processes that a batch norm shares its statistics with, as `DynamicBatchNorm2d` takes them."""
    group = getattr(norm, "process_group", None)
    return "world" if group is None and isinstance(norm, nn.SyncBatchNorm) else group


def _kept_by_convert_sync_batchnorm(kind: Kind) -> Kind:
    """Decorate a class of batch norms that `nn.SyncBatchNorm.convert_sync_batchnorm` is to keep.

    It replaces every batch norm, by its base class, with one that takes no selection. There is nothing to override in
    the module that is replaced, so the method itself is wrapped: of instances of the class it only sets the
    `process_group`, to "world" for None; for all other modules it does what it did.
    """
    replace: Any = nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]

    def convert_sync_batchnorm(
        cls: type, module: nn.Module, process_group: dist.ProcessGroup | None = None
    ) -> nn.Module:
        if not isinstance(module, kind):
            return replace(cls, module, process_group)
        module.process_group = "world" if process_group is None else process_group  # type: ignore[assignment]
        return module

    convert_sync_batchnorm.__doc__ = replace.__doc__
    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(convert_sync_batchnorm)  # type: ignore[assignment]
    return kind


@_kept_by_convert_sync_batchnorm
class DynamicBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of which each instance may use some channel groups only: see `dynamic_batch_norm`.

    `groups`: the sizes of the channel groups, or a number of equal ones; None: one group of all channels. Parameters,
    buffers and `state_dict` are those of `nn.BatchNorm2d`. With `momentum=None` running statistics are the cumulative
    average over `num_batches_tracked` steps; a channel that a step does not use keeps its average, and the step counts.
    `process_group`: the processes whose batches are normalised together while training; "world": all there are then;
    None: each its own. `nn.SyncBatchNorm.convert_sync_batchnorm` keeps this module and sets its group.

        norm(x)                 # nn.BatchNorm2d
        norm(x, levels)         # integer [B]: instance b uses the first levels[b] groups
        norm(x, mask)           # bool [B, G]
        norm(x, plan[i])        # a route of a RoutingPlan
        norm(x, plan[i], relu=True)   # with the ReLU that follows, in the same pass
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int | Sequence[int] | None = None,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.groups = group_sizes(groups, num_features, "groups", op="DynamicBatchNorm2d") or (num_features,)
        self.process_group = process_group

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm, groups: int | Sequence[int] | None = None) -> Self:
        """A dynamic batch norm that shares the parameters and buffers of `norm`; hooks stay behind.

        One that shares its statistics between processes does so in the same ones. Raises TypeError for anything else
        than an `nn.BatchNorm2d` (a subclass may compute something else behind it) or `nn.SyncBatchNorm` with parameters
        of its own (not lazy, not parametrized).
        """
        if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) or type(norm).__name__.startswith("Parametrized"):
            raise TypeError(f"{cls.__name__}.from_norm: norm must be an nn.BatchNorm2d, got {type(norm).__name__}")
        own = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta",
            groups=groups, process_group=_group_of(norm),
        )  # fmt: skip
        for names, tensors in ((norm._parameters, own._parameters), (norm._buffers, own._buffers)):
            tensors.update({name: tensor for name, tensor in names.items() if name in tensors})  # type: ignore[misc]
        return own.train(norm.training)

    def forward(self, x: Tensor, selection: Route | Tensor | None = None, relu: bool = False) -> Tensor:
        """x [B, C, H, W] -> the same shape. `selection`: Route, integer [B] or bool [B, G]; None: every channel."""
        if not isinstance(x, Tensor):
            return as_fx_leaf(self, x, selection, relu)
        process_group = self._group() if self.training and self.process_group is not None else None
        if selection is None and process_group is None:
            y = super().forward(x)
            return y.relu() if relu else y
        self._check_input_dim(x)
        if selection is None:
            selection = torch.full((x.shape[0],), len(self.groups), dtype=torch.int32, device=x.device)
        momentum: float | Tensor = 0.0  # the weight of this batch in the running statistics
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        tracked = self.track_running_stats or not self.training
        return dynamic_batch_norm(
            x, selection, self.weight, self.bias,
            self.running_mean if tracked else None, self.running_var if tracked else None,
            groups=self.groups, training=self.training, momentum=momentum, eps=self.eps, relu=relu,
            process_group=process_group,
        )  # fmt: skip

    def _group(self) -> dist.ProcessGroup | None:
        """The processes that share statistics in a training step; None: each process has its own."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group == "world" else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
