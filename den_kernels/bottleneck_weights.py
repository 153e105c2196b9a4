"""A bottleneck block's parameters, folded and packed for :func:`den_kernels.dynamic_bottleneck`."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ._conv_direct import pack
from ._extension import extension
from ._fold_checks import check_convolution, check_layers, check_norm, hidden_groups
from ._geometry import Geometry, dense
from ._handle import HasHandle
from .folding import fold_norm, norm_affine
from .residual_weights import stand_in

_OP = "dynamic_bottleneck"


@dataclass(frozen=True)
class BottleneckWeights(HasHandle):
    """A bottleneck block's parameters, folded for inference: made by :meth:`fold`, read by `dynamic_bottleneck`."""

    scale1: Tensor | None  # float32 [C]: bn1 as an affine map; None where the block has no bn1 and ReLU
    shift1: Tensor | None  # float32 [C]
    conv1: Tensor  # [M, C, 1, 1] with the scale of the norm behind it
    bias1: Tensor  # float32 [M]: that norm's shift, conv1's bias scaled
    conv2: Tensor  # [M, M / cardinality, R, S] with the scale of the norm behind it
    bias2: Tensor  # float32 [M]: that norm's shift, conv2's bias scaled
    conv3: Tensor  # [C_out, M, 1, 1], the parameter itself; of a post-activation block with bn3's scale
    bias3: Tensor | None  # float32 [C_out]: conv3's bias, of a post-activation block scaled, and bn3's shift
    groups: tuple[int, ...]  # sizes of the hidden channel groups, adding up to M
    stride: int  # of conv2 and of the average-pooled shortcut
    cardinality: int  # groups of conv2
    relu: bool = False  # of the sum: a post-activation block
    direct: tuple[Tensor, ...] | None = None  # conv1, conv2, conv3 packed for the kernel of the whole block, if it runs

    @staticmethod
    def fold(
        conv1: nn.Conv2d,
        bn1: nn.BatchNorm2d | None,
        conv2: nn.Conv2d,
        bn2: nn.BatchNorm2d,
        conv3: nn.Conv2d,
        bn3: nn.BatchNorm2d,
        *,
        post_activation: bool = False,
    ) -> "BottleneckWeights":
        """Fold running statistics and affine parameters into the convolutions.

        The block is bn1, ReLU, conv1, bn2, ReLU, conv2, bn3, ReLU, conv3 (no bn1: x is activated already). conv1:
        1 x 1, C to M channels; its `out_groups` (of a `DynamicConv2d`) are the hidden channel groups, one group for an
        ordinary `nn.Conv2d`. conv2: M to M channels, odd kernel, "same" padding, stride 1 or more, cardinality
        (`groups`), of which a hidden group holds whole ones. conv3: 1 x 1, M to C_out channels.

        With `post_activation` it is that of an ordinary ResNet (He et al., 2016, `Bottleneck`): conv1, bn1, ReLU,
        conv2, bn2, ReLU, conv3, bn3, and ReLU of the sum with the shortcut.

        Raises ValueError for convolutions of another kind, for batch norms without running statistics, and for a
        post-activation block without bn1, TypeError for convolutions of different dtypes.
        """
        groups = _checked_groups(conv1, bn1, conv2, bn2, conv3, bn3, post_activation)
        scale1 = shift1 = None
        bias3: Tensor | None
        with torch.no_grad():
            if post_activation:
                (name1, behind1), (name2, behind2) = ("bn1", bn1), ("bn2", bn2)
                folded3, bias3 = fold_norm(conv3.weight, conv3.bias, bn3, f"{_OP}: bn3")
            else:
                (name1, behind1), (name2, behind2) = ("bn2", bn2), ("bn3", bn3)
                folded3, wide = conv3.weight.detach(), torch.promote_types(conv3.weight.dtype, torch.float32)
                bias3 = None if conv3.bias is None else conv3.bias.detach().to(wide)
                if bn1 is not None:
                    scale1, shift1 = norm_affine(bn1, conv1.weight.dtype, f"{_OP}: bn1")
            assert behind1 is not None
            folded1, bias1 = fold_norm(conv1.weight, conv1.bias, behind1, f"{_OP}: {name1}")
            folded2, bias2 = fold_norm(conv2.weight, conv2.bias, behind2, f"{_OP}: {name2}")
            if folded1.device.type == "cuda":
                folded1, folded2, folded3 = dense(folded1), dense(folded2), dense(folded3)
            weights = BottleneckWeights(
                scale1, shift1, folded1, bias1, folded2, bias2, folded3, bias3, groups, conv2.stride[0], conv2.groups,
                post_activation,
            )  # fmt: skip
            return weights._with_direct() if weights._runs_direct() else weights

    @property
    def first(self) -> Tensor:
        """The weight that reads x: conv1."""
        return self.conv1

    @property
    def out_channels(self) -> int:
        """C_out: the channels of the result."""
        return self.conv3.shape[0]

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object for these weights, `extension.BottleneckBlock`; of weights with `direct`.

        Raises ValueError or TypeError for tensors that do not fit each other.
        """
        assert self.direct is not None
        C, (M, _, R, S) = self.conv1.shape[1], self.conv2.shape
        conv1, conv2, conv3 = self.direct
        tensors = self.scale1, self.shift1, conv1, self.bias1, conv2, self.bias2, conv3, self.bias3
        shape = C, M, self.out_channels, R, S, self.stride, self.cardinality
        return extension.BottleneckBlock(shape, self.groups, tensors, self.relu)

    @cached_property
    def convolutions(self) -> tuple[tuple[Tensor, Tensor | None, Geometry], ...]:
        """Weight, bias in the weight's dtype, and geometry of each convolution, to run them one by one."""
        one, groups, (R, S) = (1, 1), self.groups, self.conv2.shape[2:]
        biases = (None if b is None else b.to(self.conv1.dtype) for b in (self.bias1, self.bias2, self.bias3))
        bias1, bias2, bias3 = biases
        stride, padding = (self.stride, self.stride), (R // 2, S // 2)
        return (
            (self.conv1, bias1, Geometry(one, (0, 0), one, 1, groups, ())),
            (self.conv2, bias2, Geometry(stride, padding, one, self.cardinality, groups, groups)),
            (self.conv3, bias3, Geometry(one, (0, 0), one, 1, (), groups)),
        )

    @cached_property
    def _alone(self) -> dict[int, Tensor]:
        return {}

    def packed_alone(self, index: int, dtype: torch.dtype) -> Tensor:
        """The weight of one of `convolutions` as the direct convolution of a dtype reads it, packed in the first call.

        The dtype is always the weight's, which no autocast changes.
        """
        if index not in self._alone:
            weight, _, geometry = self.convolutions[index]
            self._alone[index] = pack(weight.to(dtype), geometry.in_sizes)
        return self._alone[index]

    def released(self) -> "BottleneckWeights":
        """A copy without the weights themselves where a direct kernel runs, which reads packed ones; else self.

        What is left of `conv1`, `conv2` and `conv3` is their shape, dtype and device: one element, repeated.
        """
        if self.direct is None:
            return self
        return replace(self, conv1=stand_in(self.conv1), conv2=stand_in(self.conv2), conv3=stand_in(self.conv3))

    def _with_direct(self) -> "BottleneckWeights":
        sizes = self.groups if self.cardinality == 1 else ()
        packed = replace(self, direct=(pack(self.conv1, ()), pack(self.conv2, sizes), pack(self.conv3, sizes)))
        _ = packed.handle  # checked here, not in the first call
        return packed

    def _runs_direct(self) -> bool:
        """True where the kernel of the whole block runs: a function of dtypes and shapes."""
        C, (M, _, R, S) = self.conv1.shape[1], self.conv2.shape
        unit = M // self.cardinality
        fits = unit % 16 == 0 or (16 % unit == 0 and all(size % 16 == 0 for size in self.groups))
        fits = fits and self.out_channels % 16 == 0 and R * S <= 49
        if extension is None or not self.conv1.is_cpu or not fits:
            return False
        if self.conv1.dtype == torch.bfloat16:
            return extension.bf16_isa() == "AMX" and self.cardinality == 1 and C % 32 == 0
        return self.conv1.dtype == torch.float32 and extension.has_direct_float32() and C % 16 == 0


def _checked_groups(
    conv1: nn.Conv2d,
    bn1: nn.BatchNorm2d | None,
    conv2: nn.Conv2d,
    bn2: nn.BatchNorm2d,
    conv3: nn.Conv2d,
    bn3: nn.BatchNorm2d,
    post_activation: bool,
) -> tuple[int, ...]:
    """The sizes of the hidden channel groups; raises for layers that are none of a block's or do not fit each other."""
    check_layers(_OP, conv1=conv1, bn1=bn1, conv2=conv2, bn2=bn2, conv3=conv3, bn3=bn3)
    for name, conv, stride, cardinality in (("conv1", conv1, 1, 1), ("conv2", conv2, None, conv2.groups),
                                            ("conv3", conv3, 1, 1)):  # fmt: skip
        check_convolution(_OP, name, conv, conv1, stride, cardinality)
    groups, C, M = hidden_groups(_OP, conv1), conv1.in_channels, conv1.out_channels
    for name, conv in (("conv1", conv1), ("conv3", conv3)):
        if conv.kernel_size != (1, 1):
            raise ValueError(f"{_OP}: {name} must have a kernel of 1 x 1, got {conv.kernel_size}")
    if post_activation and bn1 is None:
        raise ValueError(f"{_OP}: bn1 must be a batch norm in a post-activation block, got None")
    sizes = conv2.in_channels, conv2.out_channels, conv3.in_channels
    if sizes != (M, M, M) or conv3.out_channels < C:
        raise ValueError(
            f"{_OP}: conv2 and conv3 must take conv1's {M} channels, conv2 give as many and conv3 at least {C}, "
            f"got {sizes[0]}, {sizes[2]}, {sizes[1]} and {conv3.out_channels}"
        )
    unit = M // conv2.groups if conv2.groups > 1 else 1
    if any(size % unit for size in groups):
        raise ValueError(f"{_OP}: conv1.out_groups must be multiples of conv2's {unit} channels a group, got {groups}")
    sizes = (M, M, conv3.out_channels) if post_activation else (C, M, M)
    for name, norm, channels in zip(("bn1", "bn2", "bn3"), (bn1, bn2, bn3), sizes, strict=True):
        check_norm(_OP, name, norm, channels, conv1.weight)
    return groups
