"""Settings of a convolution apart from its tensors, their checks, and how tensors lie in memory."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

# Asked here, because torch.compile of 2.11 cannot look into the question.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "privateuseone")
_WITH_AUTOCAST = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


# The fields of a geometry, as a registered op takes them.
FIELDS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, SymInt[]? out_sizes, SymInt[]? in_sizes"


class Geometry(NamedTuple):
    """The settings of a convolution, and the sizes of the channel groups of both sides: () where one is not elastic."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    out_sizes: Sequence[int]
    in_sizes: Sequence[int]

    @classmethod
    def of(
        cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
        out_sizes: Sequence[int] | None, in_sizes: Sequence[int] | None,
    ) -> Self:  # fmt: skip
        """The geometry of a registered op's arguments, which are lists; for empty ones AOTInductor gives None."""
        sizes = tuple(out_sizes or ()), tuple(in_sizes or ())
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups, *sizes)

    def out_shape(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """The sizes [B, C_out, H_out, W_out] of the output."""
        (B, _, H, W), (C_out, _, R, S) = x.shape, weight.shape
        (down, right), (above, left), (apart, aside) = self.stride, self.padding, self.dilation
        H_out = (H + 2 * above - apart * (R - 1) - 1) // down + 1
        W_out = (W + 2 * left - aside * (S - 1) - 1) // right + 1
        return B, C_out, H_out, W_out


def memory_format_of(*tensors: Tensor) -> torch.memory_format:
    """Channels-last if one of the tensors [B, C, H, W] is, else contiguous: the rule of `nn.Conv2d`.

    As torch does, a tensor is taken for channels-last by its strides, slices of wider ones included.
    """
    for x in tensors:
        size, stride = x.shape, x.stride()
        least = 0
        for d in (1, 3, 2, 0):
            if size[d] == 0 or stride[1] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
                break
            least = stride[d] * size[d]
        else:
            return torch.channels_last
    return torch.contiguous_format


def is_product(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """True where the convolution of x [B, C_in, H, W] with weight [C_out, C_in, R, S] is a product of matrices.

    So it is with one tap on maps of one pixel, without padding and cardinality: as a fully connected layer.
    """
    one = tuple(x.shape[2:]) == tuple(weight.shape[2:]) == (1, 1)
    return one and geometry.groups == 1 and not any(geometry.padding)


def dense(weight: Tensor) -> Tensor:
    """weight [O, I, R, S] as [O, R, S, I] in memory without a gap, from a 16-byte boundary on; a copy where it is not.

    GPU kernels know of an activation's strides, and not of a weight's.
    """
    fits = weight.is_contiguous(memory_format=torch.channels_last) and weight.data_ptr() % 16 == 0
    return weight if fits else weight.clone(memory_format=torch.channels_last)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x [...]; for float16 on a CPU float32, in which a convolution there is ten times faster."""
    return torch.float32 if x.dtype == torch.float16 and x.is_cpu else x.dtype


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


def settle(
    shape: Sequence[int],  # of the weight: C_out, C_in / groups, R, S
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    out_sizes: Sequence[int],  # of the channel groups; () where that side is not elastic
    in_sizes: Sequence[int],  # as out_sizes
) -> tuple[Geometry, tuple[int, ...]]:
    """The checked geometry of a convolution, and the border that its maps get beforehand, as `F.pad` takes it; or ().

    A geometry pads both ends of an axis equally. "same" pads an axis by dilation * (side - 1) pixels; where that is
    odd, the border has the odd one, at the axis's end. Padding beyond the reach of the kernel, so that windows lie
    wholly on it, is in the border too: there oneDNN reads memory that is not its own on CPUs without AVX-512, and the
    process can end.

    Raises ValueError for settings that are no convolution's, and group sizes that do not add up to the channels.
    """
    if (out_sizes and sum(out_sizes) != shape[0]) or (in_sizes and sum(in_sizes) != shape[1] * groups):
        sides(shape[0], shape[1] * groups, groups, out_sizes or None, in_sizes or None)  # raises
    strides, dilations = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    reach = [step * (side - 1) for step, side in zip(dilations, shape[2:], strict=True)]
    border: tuple[int, ...] = ()
    if not isinstance(padding, str):
        above, left = pair(padding, "padding", 0)
        beyond, aside = max(0, above - reach[0]), max(0, left - reach[1])
        paddings = above - beyond, left - aside
        if beyond or aside:
            border = aside, aside, beyond, beyond
    elif padding == "valid":
        paddings = 0, 0
    elif padding == "same" and strides == (1, 1):
        paddings = reach[0] // 2, reach[1] // 2
        if reach[0] % 2 or reach[1] % 2:
            border = 0, reach[1] % 2, 0, reach[0] % 2
    else:
        raise ValueError(
            f"dynamic_conv2d: padding must be integers, 'valid', or 'same' with stride 1, "
            f"got {padding!r} with stride {strides}"
        )
    return Geometry(strides, paddings, dilations, groups, tuple(out_sizes), tuple(in_sizes)), border


def operands(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    groups: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias, in autocast's dtype where it is on (float64 stays), checked to fit each other.

    Raises ValueError for shapes, cardinality and devices, TypeError for dtypes.
    """
    device = x.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        eligible = (torch.float32, torch.float16, torch.bfloat16)
        x, weight = (each.to(dtype) if each.dtype in eligible else each for each in (x, weight))
        bias = bias if bias is None or bias.dtype not in eligible else bias.to(dtype)
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
    return x, weight, bias
