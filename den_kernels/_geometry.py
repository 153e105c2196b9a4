"""A convolution apart from its tensors, and how tensors lie in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """The settings of a convolution, and the sizes of the channel groups of both sides: () where one is not elastic."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    out_sizes: Sequence[int]
    in_sizes: Sequence[int]

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
