"""Checks of the convolutions and batch norms that are folded into the weights of a block."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def check_layers(op: str, **layers: nn.Module | None) -> None:
    """Raise TypeError unless every conv... is an nn.Conv2d, and every bn... a batch norm or None."""
    for name, layer in layers.items():
        convolution = name.startswith("conv")
        if not isinstance(layer, nn.Conv2d if convolution else _BatchNorm | None):
            kind = "an nn.Conv2d" if convolution else "an nn.BatchNorm2d"
            raise TypeError(f"{op}: {name} must be {kind}, got {type(layer).__name__}")


def hidden_groups(op: str, conv1: nn.Conv2d) -> tuple[int, ...]:
    """The sizes of the hidden channel groups: conv1's `out_groups`, of an ordinary convolution one group.

    Raises ValueError where they do not add up to its output channels.
    """
    groups = tuple(getattr(conv1, "out_groups", None) or (conv1.out_channels,))
    if sum(groups) != conv1.out_channels or min(groups) < 1:
        raise ValueError(f"{op}: conv1.out_groups must add up to {conv1.out_channels} channels, got {groups}")
    return groups


def check_convolution(
    op: str, name: str, conv: nn.Conv2d, first: nn.Conv2d, stride: int | None = 1, cardinality: int = 1
) -> None:
    """Raises for a convolution of another kind, or whose tensors are not as it says or not where `first`'s are.

    stride None allows any that is the same on both axes.
    """
    weight, like = conv.weight, first.weight
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    if weight.shape != shape or (conv.bias is not None and conv.bias.shape != shape[:1]):
        got = list(weight.shape), None if conv.bias is None else list(conv.bias.shape)
        raise ValueError(f"{op}: {name} must have a weight {list(shape)} and a bias [{shape[0]}] or None, got {got}")
    for part, tensor in (("weight", weight), ("bias", conv.bias)):
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{op}: {name}.{part} must be on {like.device} as conv1 is, got {tensor.device}")
        if tensor is not None and tensor.dtype != like.dtype:
            raise TypeError(f"{op}: {name}.{part} must be {like.dtype} as conv1 is, got {tensor.dtype}")
    padding = tuple(k // 2 for k in conv.kernel_size)
    plain = conv.groups == cardinality and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    same = conv.padding == "same" or conv.padding == padding
    if not plain or not same or any(k % 2 == 0 for k in conv.kernel_size) or conv.stride[0] != conv.stride[1]:
        one = "dilation and groups 1" if cardinality == 1 else "dilation 1"
        raise ValueError(f"{op}: {name} must have an odd kernel, 'same' zero padding, {one}, got {conv}")
    if stride is not None and conv.stride[0] != stride:
        raise ValueError(f"{op}: {name} must have stride {stride}, got {conv.stride[0]}")


def check_norm(op: str, name: str, norm: nn.BatchNorm2d | None, channels: int, like: Tensor) -> None:
    """Raise ValueError unless the tensors of a batch norm are [channels] on the device of `like`, of any shape."""
    for part in ("weight", "bias", "running_mean", "running_var"):
        tensor = None if norm is None else getattr(norm, part)
        if tensor is not None and (tensor.shape != (channels,) or tensor.device != like.device):
            got = f"{list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{op}: {name}.{part} must be [{channels}] on {like.device}, got {got}")
