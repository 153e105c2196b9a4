"""Checks of the arguments of a dynamic convolution, and their conversion to the form that the kernels take."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Asked here, because torch.compile of 2.11 cannot look into the question.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "privateuseone")
_WITH_AUTOCAST = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def group_sizes(
    groups: int | Sequence[int] | None, channels: int, name: str, cardinality: int = 1, op: str = "dynamic_conv2d"
) -> tuple[int, ...]:
    """The sizes of channel groups: () for None, equal ones for an int, else the given ones.

    >>> group_sizes(4, 64, "out_groups")
    (16, 16, 16, 16)

    Raises ValueError where they do not add up to `channels` or a boundary is not one of the `cardinality` groups, and
    TypeError for anything but integers.
    """
    if groups is None:
        return ()
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 1 or channels % groups:
            raise ValueError(f"{op}: {name} must divide {channels} channels into equal groups, got {groups}")
        sizes: tuple[int, ...] = (channels // groups,) * groups
    elif isinstance(groups, Sequence) and all(type(s) is int for s in groups):
        sizes = tuple(groups)
    else:
        raise TypeError(f"{op}: {name} must be None, an int or a sequence of ints, got {groups!r}")
    if sum(sizes) != channels or min(sizes) < 1:
        raise ValueError(f"{op}: {name} must be positive and add up to {channels} channels, got {sizes}")
    step = channels // cardinality
    if cardinality > 1 and any(size % step for size in sizes):
        raise ValueError(
            f"{op}: {name} must be multiples of {step}, the channels of one of {cardinality} cardinality "
            f"groups, got {sizes}"
        )
    return sizes


def sides(
    out_channels: int,
    in_channels: int,
    cardinality: int,
    out_groups: int | Sequence[int] | None,
    in_groups: int | Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Group sizes of both sides; raises ValueError where neither has any or they differ in number."""
    out_sizes = group_sizes(out_groups, out_channels, "out_groups", cardinality)
    in_sizes = group_sizes(in_groups, in_channels, "in_groups", cardinality)
    if not out_sizes and not in_sizes:
        raise ValueError("dynamic_conv2d: out_groups or in_groups must be set to use a selection, got None for both")
    if out_sizes and in_sizes and len(out_sizes) != len(in_sizes):
        raise ValueError(
            f"dynamic_conv2d: in_groups must have {len(out_sizes)} groups as out_groups, got {len(in_sizes)}"
        )
    return out_sizes, in_sizes


def pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    """A setting of rows and columns; raises ValueError for anything but integers of at least `least`."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 2 and isinstance(values[0], int) and isinstance(values[1], int) and min(values) >= least:
        return values
    raise ValueError(f"dynamic_conv2d: {name} must be one or two integers of at least {least}, got {value!r}")


def pad(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    padding: int | Sequence[int] | str,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """x and the padding left to the convolution, which pads both ends of an axis equally.

    "same" pads an axis by dilation * (side - 1) pixels; where that is odd, x gets the odd one here, at its end. Padding
    beyond the reach of the kernel, so that windows lie wholly on it, is put into x too: there oneDNN reads memory that
    is not its own on CPUs without AVX-512, and the process can end.
    """
    reach = [step * (side - 1) for step, side in zip(dilation, weight.shape[2:], strict=True)]
    if not isinstance(padding, str):
        above, left = pair(padding, "padding", 0)
        beyond, aside = max(0, above - reach[0]), max(0, left - reach[1])
        if beyond or aside:
            x = F.pad(x, (aside, aside, beyond, beyond))
        return x, (above - beyond, left - aside)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(
            f"dynamic_conv2d: padding must be integers, 'valid', or 'same' with stride 1, "
            f"got {padding!r} with stride {stride}"
        )
    if reach[0] % 2 or reach[1] % 2:
        x = F.pad(x, (0, reach[1] % 2, 0, reach[0] % 2))
    return x, (reach[0] // 2, reach[1] // 2)


def autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Cast x [B, C, H, W] and the other arguments of a convolution to autocast's dtype if it is on; float64 stays."""
    tensors = [x, *others]
    device = x.device.type
    if device not in _WITH_AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors]


def check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Raise unless x is [B, C_in, H, W], weight [C_out, C_in / groups, R, S] and bias [C_out], alike in kind.

    ValueError for shapes, cardinality and devices, TypeError for dtypes.
    """
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"dynamic_conv2d: x and weight must have four axes, got {list(x.shape)} and {list(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"dynamic_conv2d: groups must divide {weight.shape[0]} output channels, got {groups}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"dynamic_conv2d: x must have {weight.shape[1] * groups} channels, got {x.shape[1]}")
    if not x.is_floating_point():
        raise TypeError(f"dynamic_conv2d: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"dynamic_conv2d: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"dynamic_conv2d: {name} must be {x.dtype} as x is, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"dynamic_conv2d: {name} must be on {x.device} as x is, got {tensor.device}")
