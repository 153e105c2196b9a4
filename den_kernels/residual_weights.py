"""A residual block's parameters, folded and packed for :func:`den_kernels.dynamic_residual`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _cuda
from ._conv_direct import pack
from ._extension import extension
from ._fold_checks import check_convolution, check_layers, check_norm, hidden_groups
from ._geometry import compute_dtype, dense
from ._handle import HasHandle
from .folding import fold_norm, norm_affine, shifted_bias

_OP = "dynamic_residual"

# Fewest input channels of conv1 and conv2 that are read unpacked if `copy` is False: with fewer, that is too slow.
# conv2 needs more, because its inputs are hidden channels, of which a low level keeps few.
_WIDE = (128, 256)
_HAS_DIRECT = {torch.float32: "has_direct_float32", torch.bfloat16: "has_direct_bf16"}


def stand_in(weight: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of weight [O, I, R, S] that takes no memory: one NaN, repeated."""
    return torch.full_like(weight[0, 0, 0, 0], torch.nan).expand(weight.shape)


def is_stand_in(weight: Tensor) -> bool:
    """True for a weight [O, I, R, S] of which a `stand_in` is left."""
    return not any(weight.stride())


class HiddenWeights(NamedTuple):
    """The weights of one selection of hidden channels, channels-last.

    Not in oneDNN's own blocked layout: that depends on the sizes of the map, and where it is another than a call's the
    weights are reordered in that call, 50 times as slowly as channels-last ones (AVX2, 256 channels, 14 x 14).
    """

    conv1: Tensor  # [width, C, R, S]
    bias1: Tensor  # [width]
    conv2: Tensor  # [C_out, width, R, S]


@dataclass(frozen=True)
class ResidualWeights(HasHandle):
    """A residual block's parameters, folded for inference: made by :meth:`fold`, read by :func:`dynamic_residual`."""

    scale1: Tensor | None  # float32 [C]: bn1 as an affine map; None where the block has no bn1 and ReLU
    shift1: Tensor | None  # float32 [C]
    conv1: Tensor  # [M, C, R, S], the parameter itself
    scale2: Tensor  # float32 [M]: bn2 as an affine map
    bias1: Tensor  # float32 [M]: bn2's shift, conv1's bias scaled
    conv2: Tensor  # [C_out, M, R, S], the parameter itself; of a post-activation block with bn2's scale
    bias2: Tensor | None  # float32 [C_out]
    groups: tuple[int, ...]  # sizes of the hidden channel groups, adding up to M
    group_of_channel: Tensor  # int64 [M]: the group that a hidden channel belongs to
    stride: int  # of conv1 and of the average-pooled shortcut
    relu: bool = False  # of the sum: a post-activation block
    direct: tuple[Tensor, ...] | None = None  # where a direct kernel runs: conv1 and conv2 packed for it, or as is
    levels: tuple[HiddenWeights, ...] = ()  # of levels 1..G on a CPU, where no direct kernel runs

    @staticmethod
    def fold(
        conv1: nn.Conv2d,
        bn1: nn.BatchNorm2d | None,
        conv2: nn.Conv2d,
        bn2: nn.BatchNorm2d,
        *,
        post_activation: bool = False,
        copy: bool = True,
    ) -> "ResidualWeights":
        """Fold running statistics and affine parameters into the convolutions.

        conv1: C to M channels, odd kernel, "same" padding, stride 1 or more; its `out_groups` (of a `DynamicConv2d`)
        are the hidden channel groups, one group for an ordinary `nn.Conv2d`. conv2: M to C_out channels, stride 1.

        The block is bn1, ReLU, conv1, bn2, ReLU, conv2 (no bn1: x is activated already). With `post_activation` it is
        that of an ordinary ResNet (He et al., 2016, `BasicBlock`): conv1, bn1, ReLU, conv2, bn2, and ReLU of the sum
        with the shortcut. bn2 is then multiplied into a copy of conv2's weight.

        copy: pack all weights for the kernel. Without, those of many input channels are read where they are
        (channels-last; of bfloat16 with AVX-512 BF16), more slowly: a network that keeps its parameters then needs no
        second place for most of them.

        Raises ValueError for convolutions of another kind, for batch norms without running statistics, and for a
        post-activation block without bn1.
        """
        groups = _checked_groups(conv1, bn1, conv2, bn2, post_activation)
        with torch.no_grad():
            dtype = conv1.weight.dtype
            wide = torch.promote_types(dtype, torch.float32)
            weight2 = conv2.weight.detach()
            bias2 = None if conv2.bias is None else conv2.bias.detach().to(wide).contiguous()
            if post_activation:
                if bn1 is None:
                    raise ValueError(f"{_OP}: bn1 must be a batch norm in a post-activation block, got None")
                scale1 = shift1 = None
                scale2, shift2 = norm_affine(bn1, dtype, f"{_OP}: bn1")
                weight2, bias2 = fold_norm(weight2, bias2, bn2, f"{_OP}: bn2")
            else:
                scale1, shift1 = (None, None) if bn1 is None else norm_affine(bn1, dtype, f"{_OP}: bn1")
                scale2, shift2 = norm_affine(bn2, dtype, f"{_OP}: bn2")
            group_of_channel = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
            weights = ResidualWeights(
                scale1,
                shift1,
                conv1.weight.detach(),
                scale2,
                shifted_bias(conv1.bias, scale2, shift2),
                weight2,
                bias2,
                groups,
                group_of_channel.to(conv1.weight.device),
                conv1.stride[0],
                post_activation,
            )
            packed = weights._prepacked(copy)
            if packed.direct is not None:
                _ = packed.handle  # checked here, not in the first call
            return packed

    @cached_property
    def handle(self) -> Any:
        """The direct kernel's own object for these weights, `extension.ResidualBlock`; of weights with `direct`.

        Raises ValueError or TypeError for tensors that do not fit each other.
        """
        assert self.direct is not None
        (C_out, M), (_, C, R, S) = self.conv2.shape[:2], self.conv1.shape
        tensors = (self.scale1, self.shift1, self.direct[0], self.scale2, self.bias1, self.direct[1], self.bias2)
        return extension.ResidualBlock((C, M, C_out, R, S, self.stride), self.groups, tensors, self.relu)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of these weights for the fused kernel of a GPU: see `_cuda.addresses_of`."""
        return _cuda.addresses_of(self)

    @property
    def first(self) -> Tensor:
        """The weight that reads x: conv1."""
        return self.conv1

    @property
    def out_channels(self) -> int:
        """C_out: the channels of the result."""
        return self.conv2.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the block computes in: float16 on a CPU in float32, ten times faster there."""
        return compute_dtype(self.conv1)

    @property
    def unpacked(self) -> tuple[bool, bool]:
        """True for each of conv1 and conv2 that the direct kernel reads where it is."""
        if self.direct is None:
            return False, False
        return self.direct[0].ndim == 4, self.direct[1].ndim == 4

    def released(self) -> "ResidualWeights":
        """A copy without the weights themselves, where a direct kernel runs, which reads packed ones; else self.

        What is left of `conv1` and `conv2` is their shape, dtype and device: one element, repeated.
        """
        if self.direct is None:
            return self
        return replace(self._packed(), conv1=stand_in(self.conv1), conv2=stand_in(self.conv2))

    def all_hidden(self) -> HiddenWeights:
        """The weights of all hidden channels, bn2 folded in."""
        conv1 = self.conv1.to(self.scale2.dtype) * self.scale2[:, None, None, None]  # rounded once, to the wider dtype
        return HiddenWeights(
            _channels_last(conv1, self.dtype), self.bias1.to(self.dtype), _channels_last(self.conv2, self.dtype)
        )

    def hidden(self, groups: tuple[bool, ...], whole: HiddenWeights) -> HiddenWeights:
        """The weights of a selection of groups, put together: masks have too many selections to prepare them all."""
        outputs, biases, inputs = (
            [part for part, chosen in zip(tensor.split(self.groups, dim), groups, strict=True) if chosen]
            for tensor, dim in ((whole.conv1, 0), (whole.bias1, 0), (whole.conv2, 1))
        )
        return HiddenWeights(torch.cat(outputs), torch.cat(biases), _channels_last(torch.cat(inputs, 1)))

    def _packed(self, copy: bool = True) -> "ResidualWeights":
        """Pack for the direct kernel what is not packed yet; without `copy` only what it cannot read where it is."""
        conv1, conv2 = self.direct or (self.conv1, self.conv2)
        if conv1.ndim == 4 and (copy or not _may_stay(conv1, _WIDE[0])):
            conv1 = pack(conv1, (), self.scale2)
        if conv2.ndim == 4 and (copy or not _may_stay(conv2, _WIDE[1])):
            conv2 = pack(conv2, self.groups)
        return replace(self, direct=(conv1, conv2))

    def _prepacked(self, copy: bool) -> "ResidualWeights":
        """The weights in the layouts that the device's kernels read, so that no call copies or reorders a weight."""
        if self.conv1.device.type == "cuda":
            return replace(self, conv1=dense(self.conv1), conv2=dense(self.conv2))
        if runs_direct(self.conv1.device, self.conv1.dtype, self.conv1.shape, self.conv2.shape):
            return self._packed(copy)
        if self.conv1.device.type != "cpu":
            return self
        whole = self.all_hidden()
        levels = tuple(
            HiddenWeights(whole.conv1[:width], whole.bias1[:width], _channels_last(whole.conv2[:, :width]))
            for width in accumulate(self.groups)
        )
        return replace(self, levels=levels)


def runs_direct(device: torch.device, dtype: torch.dtype, conv1: Sequence[int], conv2: Sequence[int]) -> bool:
    """True where a direct kernel takes the block with weights of these shapes, [M, C, R, S] and [C_out, M, R, S].

    float32 on a CPU with AVX-512 or AVX2, bfloat16 on one with AMX or AVX-512 BF16; whole vectors of channels, one
    kernel size up to 7 x 7.
    """
    if extension is None or device.type != "cpu" or tuple(conv1[2:]) != tuple(conv2[2:]) or conv1[2] * conv1[3] > 49:
        return False
    if dtype not in _HAS_DIRECT or conv1[1] % 16 or conv2[0] % 16:
        return False
    return getattr(extension, _HAS_DIRECT[dtype])()


def _may_stay(weight: Tensor, wide: int) -> bool:
    """True where the kernel can read weight [O, I, R, S] where it is without losing much time."""
    pairs = weight.dtype == torch.bfloat16 and extension.bf16_isa() == "AVX-512 BF16"
    even = weight.shape[0] % 2 == weight.shape[1] % 2 == 0
    readable = (weight.dtype == torch.float32 or (pairs and even)) and weight.is_contiguous(
        memory_format=torch.channels_last
    )
    return readable and weight.shape[1] >= wide


def _checked_groups(
    conv1: nn.Conv2d, bn1: nn.BatchNorm2d | None, conv2: nn.Conv2d, bn2: nn.BatchNorm2d, post_activation: bool
) -> tuple[int, ...]:
    """The sizes of the hidden channel groups; raises for layers that are none of a block's or do not fit each other."""
    check_layers(_OP, conv1=conv1, bn1=bn1, conv2=conv2, bn2=bn2)
    check_convolution(_OP, "conv1", conv1, conv1, stride=None)
    check_convolution(_OP, "conv2", conv2, conv1)
    groups = hidden_groups(_OP, conv1)
    if conv2.in_channels != conv1.out_channels or conv2.out_channels < conv1.in_channels:
        raise ValueError(
            f"{_OP}: conv2 must take conv1's {conv1.out_channels} channels and give at least {conv1.in_channels}, "
            f"got {conv2.in_channels} and {conv2.out_channels}"
        )
    norms = (conv1.out_channels, conv2.out_channels) if post_activation else (conv1.in_channels, conv1.out_channels)
    for name, norm, channels in (("bn1", bn1, norms[0]), ("bn2", bn2, norms[1])):
        check_norm(_OP, name, norm, channels, conv1.weight)
    return groups


def _channels_last(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [O, I, R, S]
    return weight.to(dtype or weight.dtype).contiguous(memory_format=torch.channels_last)
