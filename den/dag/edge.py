"""An edge of the central graph: convolution, batch norm and ReLU for the instances whose task keeps it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.folding import folded_conv, norm_tensors
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, Route
from den_kernels.building import FoldCache, may_fold


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

    def forward(self, x: Tensor, route: Route | None) -> Tensor:  # [B, C, H, W]
        if route is None:
            return self.norm(self.conv(x), relu=True)
        if may_fold(self):
            return self.folded()(x, route).relu_()
        return self.norm(self.conv(x, route), route, relu=True)

    def folded(self) -> DynamicConv2d:
        """The convolution with the batch norm folded in, from the cache while nothing it depends on changed."""
        sources = self.conv.weight, *norm_tensors(self.norm)
        return self._folded.get(sources, lambda: folded_conv(self.conv, self.norm), self.norm.eps)

    def train(self, mode: bool = True) -> Edge:
        self._folded.clear()
        return super().train(mode)


def reference_edge(edge: Edge, x: Tensor, levels: Tensor) -> Tensor:
    """Compute `Edge` with all its groups in plain PyTorch: x [B, C, H, W], levels [B] -> [B, C', H', W'].

    Instances at level 0 get zeros; the others are convolved and normalised together.  Running statistics are updated as
    the edge updates them.
    """
    conv, used = edge.conv, levels > 0
    out = torch.zeros_like(F.conv2d(x, conv.weight, None, conv.stride, conv.padding))
    if bool(used.any()):
        norm = edge.norm
        y = F.conv2d(x[used], conv.weight, None, conv.stride, conv.padding)
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, norm.eps)
        out = out.index_put((used.nonzero().flatten(),), y.relu())
    return out
