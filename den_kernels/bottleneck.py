"""A bottleneck block at inference on a CPU: all three convolutions in one call of C++ (csrc/dynamic_bottleneck.cpp).

Equivalent, for an instance whose selected hidden channels are `s`, to

    shortcut + conv3[:, s](relu(conv2[s, s](relu(conv1[s](relu(scale1 * x + shift1)) + bias1[s])) + bias2[s]))

(Ahn, Kim, Oh, ICCV 2019, section 3.1, on the block of He et al., CVPR 2016); an instance that selects none is not
touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ._conv_direct import pack, selections
from ._extension import extension
from ._handle import HasHandle
from .eager import in_range, refuse_transforms, runs_eagerly
from .plan import Route

_NAME = "den_kernels::add_bottleneck_"


@dataclass(frozen=True)
class BottleneckWeights(HasHandle):
    """The block's weights, batch norms folded, as the kernel reads them; made by :meth:`pack`."""

    tensors: tuple[Tensor | None, ...]  # scale1, shift1, conv1, bias1, conv2, bias2, conv3
    shape: tuple[int, ...]  # C, M, C_out, R, S, stride, cardinality
    groups: tuple[int, ...]  # sizes of the hidden channel groups

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object for these weights; ValueError or TypeError for tensors that do not fit it."""
        return extension.BottleneckBlock(self.shape, self.groups, self.tensors)

    @staticmethod
    def pack(
        affine: tuple[Tensor, Tensor] | tuple[None, None],  # scale1 and shift1 of bn1, float32 [C]; None: no ReLU
        conv1: nn.Conv2d,  # 1x1, C to M channels, bias
        conv2: nn.Conv2d,  # odd kernel, M to M channels, "same" padding, stride and cardinality, bias
        conv3: nn.Conv2d,  # 1x1, M to C_out channels, no bias
        groups: Sequence[int],
    ) -> "BottleneckWeights | None":
        """The weights packed; None where the kernel does not run: a function of dtypes and shapes alone."""
        M, C_out, (R, S) = conv2.out_channels, conv3.out_channels, conv2.kernel_size
        if not _runs(conv1, conv2, C_out):
            return None
        sizes = tuple(groups) if conv2.groups == 1 else ()
        packed = [pack(conv.weight.detach(), s) for conv, s in ((conv1, ()), (conv2, sizes), (conv3, sizes))]
        biases = [None if conv.bias is None else conv.bias.detach().float().contiguous() for conv in (conv1, conv2)]
        tensors = (*affine, packed[0], biases[0], packed[1], biases[1], packed[2])
        shape = (conv1.in_channels, M, C_out, R, S, conv2.stride[0], conv2.groups)
        weights = BottleneckWeights(tensors, shape, tuple(groups))
        _ = weights.handle  # checked here, not in the first call
        return weights


def _runs(conv1: nn.Conv2d, conv2: nn.Conv2d, C_out: int) -> bool:
    weight, M, (R, S) = conv1.weight, conv2.out_channels, conv2.kernel_size
    fits = weight.is_cpu and C_out % 16 == 0 and M % (16 * conv2.groups) == 0 and R * S <= 49
    if extension is None or not fits:
        return False
    if weight.dtype == torch.bfloat16:
        return extension.bf16_isa() == "AMX" and conv2.groups == 1 and conv1.in_channels % 32 == 0
    return weight.dtype == torch.float32 and extension.has_dynamic_residual() and conv1.in_channels % 16 == 0


def add_bottleneck_(out: Tensor, x: Tensor, route: Route, weights: BottleneckWeights) -> Tensor:
    """Add the branch of `x` [B, C, H, W] to `out` [B, C_out, H_out, W_out], which may be `x`; both channels-last."""
    refuse_transforms("add_bottleneck_")
    if runs_eagerly(out, x):
        return in_range(_NAME, _run, out, x, route, weights)
    x = x.clone() if x is out else x
    tensors, *numbers = (getattr(weights, field.name) for field in fields(weights))
    given = [x.new_empty(0) if tensor is None else tensor for tensor in tensors]
    _op(out, x, route.levels, route.order, route.offsets, route.mask, given, *map(list, numbers))
    return out


@torch.library.custom_op(_NAME, mutates_args=("out",))
def _op(
    out: Tensor,
    x: Tensor,
    levels: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    tensors: Sequence[Tensor],  # of BottleneckWeights; without elements for None (jit.trace takes no optional ones)
    shape: Sequence[int],
    groups: Sequence[int],
) -> None:
    route = Route(levels, order, offsets, len(groups), mask)
    given = tuple(tensor if tensor.numel() else None for tensor in tensors)
    _run(out, x, route, BottleneckWeights(given, tuple(shape), tuple(groups)))


def _run(out: Tensor, x: Tensor, route: Route, weights: BottleneckWeights) -> Tensor:
    weights.handle(x, out, selections(route))
    return out
