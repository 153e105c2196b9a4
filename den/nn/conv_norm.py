"""Convolution, batch norm and ReLU, run as one convolution for inference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.folding import folded_weight, may_fold
from den.nn.modules import lay_out_channels_last
from den_kernels import DynamicBatchNorm2d
from den_kernels.building import FoldCache


class ConvNormReLU(nn.Module):
    """`relu(norm(conv(x)))`, x [B, C, H, W] -> [B, out, H', W'] channels-last in memory.

    In eval mode without gradients the batch norm is folded into the convolution. An empty batch leaves the running
    statistics as they are.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        self.norm = DynamicBatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        lay_out_channels_last(self)
        self._folded: FoldCache[tuple[Tensor, Tensor]] = FoldCache()

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if may_fold(self):
            weight, bias = self._folded.of((conv, norm), lambda: folded_weight(conv, norm))
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation).relu_()
        else:
            y = F.relu(norm(conv(x)))
        return y.contiguous(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "ConvNormReLU":
        self._folded.clear()
        return super().train(mode)
