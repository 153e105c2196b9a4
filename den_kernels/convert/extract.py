"""One structure of a converted model as a plain module."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .carrier import ElasticModel, Remember, Shared, carrier_of
from .fused import unfused
from .layers import Routed, RoutedBatchNorm2d, RoutedConv2d, RoutedLinear

_OP = "extract"


def extract(model: nn.Module, structure: Sequence[int] | Tensor) -> nn.Module:
    """A plain module that computes what the converted model does where every instance has these levels.

    structure: a level for each block of the report, integers [N]. The model itself is not changed, nor shared with. The
    result holds modules of torch.nn in the place of elastic layers, sliced to the channels that the levels keep, and
    needs den_kernels neither to run nor to load. Of a block at level 0 one hidden channel with weights of 0 remains,
    because the forward of the block, which is not ours, still runs it. Statistics of a level that `recalibrate`
    measured are taken over.

    Raises ValueError for a model that was not converted and for a structure of other length, or with levels out of
    range or below the lowest of a block.
    """
    if isinstance(model, ElasticModel):
        model = model.model
    shared = carrier_of(model, _OP).shared
    levels = _levels(structure, shared)
    plain = unfused(copy.deepcopy(model))
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Routed):
            made = plain_layer(layer, levels[layer.block], shared.groups)
            plain.set_submodule(name, made.train(layer.training))
    for module in plain.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Remember):
                del module._forward_hooks[key]
    return plain


def _levels(structure: Sequence[int] | Tensor, shared: Shared) -> list[int]:
    levels = [int(level) for level in structure]
    if len(levels) != len(shared.blocks):
        raise ValueError(f"{_OP}: structure must have {len(shared.blocks)} levels, one for each block, got {levels}")
    for n, (level, block) in enumerate(zip(levels, shared.blocks, strict=True)):
        if not block.lowest <= level <= shared.groups:
            raise ValueError(
                f"{_OP}: structure must be {block.lowest}..{shared.groups} for block {n} ({block.name}), got {level}"
            )
    return levels


def plain_layer(layer: Any, level: int, groups: int) -> nn.Module:
    """The module of torch.nn that computes what a routed layer does at a level."""
    if isinstance(layer, RoutedBatchNorm2d):
        norm = _norm(layer, level, groups)
        return nn.Sequential(norm, *layer.children()) if len(list(layer.children())) else norm
    outs, ins = _kept(layer.out_groups, level), _kept(layer.in_groups, level)
    weight = layer.weight.detach()
    weight = weight if outs is None else weight[:outs]
    weight = weight if ins is None or getattr(layer, "groups", 1) > 1 else weight[:, :ins]
    bias = None if layer.bias is None else layer.bias.detach()
    bias = bias if bias is None or outs is None else bias[:outs]
    if level == 0:
        weight, bias = _nothing(layer, weight), None
    made = _linear(weight, bias) if isinstance(layer, RoutedLinear) else _conv(layer, weight, bias, level)
    made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    unread = layer.in_channels - made.in_channels if isinstance(made, nn.Conv2d) and not layer.in_groups else 0
    # A grouped convolution that is elastic in its outputs alone, a depthwise one that stands first, reads fewer inputs.
    return nn.Sequential(nn.ConstantPad3d((0, 0, 0, 0, 0, -unread), 0.0), made) if unread else made


def _kept(sizes: Sequence[int], level: int) -> int | None:
    """The channels that a level keeps of an elastic side, at least one; None for a side that is not elastic."""
    return max(1, sum(sizes[:level])) if sizes else None


def _nothing(layer: RoutedConv2d | RoutedLinear, weight: Tensor) -> Tensor:
    """Weights of 0 that read and write one hidden channel, without cardinality."""
    outs = 1 if layer.out_groups else weight.shape[0]
    ins = 1 if layer.in_groups else weight.shape[1] * getattr(layer, "groups", 1)
    return weight.new_zeros(outs, ins, *weight.shape[2:])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)


def _conv(layer: RoutedConv2d, weight: Tensor, bias: Tensor | None, level: int) -> nn.Conv2d:
    outs = weight.shape[0]
    groups = 1 if level == 0 else layer.groups * outs // layer.out_channels if layer.groups > 1 else 1
    same: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    same |= {"groups": groups, "bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    made = nn.Conv2d(weight.shape[1] * groups, outs, layer.kernel_size, **same)  # type: ignore[arg-type]
    if _is_channels_last(layer.weight):
        made.weight.data = made.weight.data.contiguous(memory_format=torch.channels_last)
    return made


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _norm(layer: RoutedBatchNorm2d, level: int, groups: int) -> nn.BatchNorm2d:
    channels = layer.num_features if layer.closes else max(1, sum(layer.groups[:level]))
    state = {key: value for key, value in layer.state_dict().items() if "." not in key}
    means, variances = state.pop("level_mean", None), state.pop("level_var", None)
    if means is not None and variances is not None and 0 < level < groups:
        state |= {"running_mean": means[level - 1], "running_var": variances[level - 1]}
    state = {key: value[:channels] if value.ndim else value for key, value in state.items()}
    like = next((value for value in state.values() if value.is_floating_point()), torch.empty(0))
    if level == 0:
        state |= {"weight": like.new_zeros(channels), "bias": like.new_zeros(channels)}
    made = nn.BatchNorm2d(
        channels, layer.eps, layer.momentum, "weight" in state, layer.track_running_stats, like.device, like.dtype
    )
    made.load_state_dict(state)
    return made
