"""The convolution in a block's shortcut, with all its channels, as `dynamic_trunk` runs it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._extension import extension
from ._handle import HasHandle


@dataclass(frozen=True)
class Projection(HasHandle):
    """`conv(x) + bias`, of stride 1 or more, one padding, no dilation and no cardinality.

    weight: [C_out, C, R, S]. bias: [C_out]. packed: the weight as the kernel reads it; None: packed in the first call.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    packed: Tensor | None = None

    @staticmethod
    def of(conv: nn.Conv2d, packed: Tensor | None = None) -> "Projection | None":
        """Of a convolution's parameters; None where a trunk does not run it: of another kind, or not "same" padding."""
        (R, S), weight = conv.kernel_size, conv.weight.detach()
        plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        same = R == S and R % 2 == 1 and R * S <= 49 and conv.stride[0] == conv.stride[1]
        if not plain or not same or conv.padding != (R // 2, S // 2):
            return None
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().contiguous()
        return Projection(weight, bias, conv.stride[0], R // 2, packed)

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object, `extension.DenseConv`, with the weight packed for it."""
        (C_out, C, R, S), half = self.weight.shape, self.weight.dtype == torch.bfloat16
        sizes = C, C_out, R, S, self.stride, self.padding
        packed = self.packed
        if packed is None:
            packed = self.weight.new_empty(extension.dense_packed_size(sizes, half))
            extension.pack_dense(sizes, self.weight.contiguous(memory_format=torch.channels_last), packed)
        return extension.DenseConv(sizes, packed.flatten(), self.bias, relu=False)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C_out, H_out, W_out], by torch."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
