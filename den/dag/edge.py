"""An edge of the central graph: convolution, batch norm and ReLU for the instances whose task keeps it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.folding import may_fold, norm_tensors
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, Route
from den_kernels.fold_cache import FoldCache

Pair = tuple[int, int]


class Edge(nn.Module):
    """``relu(norm(conv(x)))`` of the instances that the route lets through, in their channel groups; 0 elsewhere.
    Without a route: of all.

    x [B, C, H, W] -> [B, out, H / stride, W / stride], rounded up, channels-last.  Nothing is computed for an instance
    at level 0, and what it holds does not enter the batch norm's statistics.  For inference the batch norm is folded
    into the convolution.
    """

    def __init__(
        self, channels: int, groups: int, out_channels: int | None = None, stride: int = 1, kernel_size: int = 3
    ) -> None:
        super().__init__()
        out = out_channels or channels
        self.conv = DynamicConv2d(
            channels, out, kernel_size, stride, kernel_size // 2, bias=False, out_groups=groups
        )  # fmt: skip
        self.norm = DynamicBatchNorm2d(out, groups=groups)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._folded: FoldCache[DynamicConv2d] = FoldCache()

    def forward(self, x: Tensor, route: Route | None) -> Tensor:
        if route is None:
            return self.norm(self.conv(x), relu=True)
        if may_fold(self):
            return self._folded.get((self.conv.weight, *norm_tensors(self.norm)), self._fold)(x, route).relu_()
        return self.norm(self.conv(x, route), route, relu=True)

    def train(self, mode: bool = True) -> Edge:
        self._folded.clear()
        return super().train(mode)

    @torch.inference_mode(False)  # an inference tensor has no version, by which the convolution keeps its packed weight
    def _fold(self) -> DynamicConv2d:
        """The convolution with the batch norm's scale and shift."""
        weight, bias = folded(self.conv.weight, self.norm)
        own = self.conv
        kernel_size, stride, padding = cast(tuple[Pair, Pair, Pair], (own.kernel_size, own.stride, own.padding))
        conv = DynamicConv2d(
            own.in_channels, own.out_channels, kernel_size, stride, padding,
            device="meta", dtype=weight.dtype, out_groups=own.out_groups,
        )  # fmt: skip
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv.eval().requires_grad_(False)


def folded(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [O, I, R, S], channels-last, and bias [O] that do what the convolution and the batch norm after it do.

    Computed in at least float32.
    """
    precise = torch.promote_types(weight.dtype, torch.float32)
    gain, shift, mean, var = (tensor.detach().to(precise) for tensor in norm_tensors(norm))
    scale = gain * torch.rsqrt(var + norm.eps)
    scaled = (weight.detach().to(precise) * scale[:, None, None, None]).to(weight.dtype)
    return scaled.contiguous(memory_format=torch.channels_last), (shift - mean * scale).to(weight.dtype)


def reference_edge(edge: Edge, x: Tensor, levels: Tensor) -> Tensor:
    """What `Edge` computes, in plain PyTorch operations and with all groups: the instances at a level above 0 together.

    Running statistics move as the edge's would.
    """
    conv, used = edge.conv, levels > 0
    out = torch.zeros_like(F.conv2d(x, conv.weight, None, conv.stride, conv.padding))
    if bool(used.any()):
        norm = edge.norm
        y = F.conv2d(x[used], conv.weight, None, conv.stride, conv.padding)
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, norm.eps)
        out = out.index_put((used.nonzero().flatten(),), y.relu())
    return out
