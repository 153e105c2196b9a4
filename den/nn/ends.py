"""The layers around the blocks: each task's stem before them, the norm and fully connected layers behind them."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.backbones import Backbone
from den.nn.blocks import BlockShape
from den.nn.folding import folded_weight
from den.nn.modules import lay_out_channels_last
from den.nn.tasks import Task
from den_kernels import DynamicBatchNorm2d, dynamic_batch_norm
from den_kernels.building import FoldCache, enlarge, may_fold

KERNEL = 7


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


def stem_geometry(size: int, out_size: int, kernel: int = KERNEL) -> tuple[int, int]:
    """Stride and padding of the convolution that takes a `size` map (`>= out_size`) to exactly `out_size`.

    The stride is `ceil(size / out_size)`. An odd total of padding is rounded up: with a stride of 2 or more the
    convolution drops the row too many by itself.
    `stem_geometry(96, 32) == (3, 2)`, `stem_geometry(28, 16) == (2, 5)`.
    """
    stride = -(-size // out_size)
    total = (out_size - 1) * stride + kernel - size
    return stride, max(0, -(-total // 2))


class Stem(nn.Module):
    """Images [B, C_k, S_k, S_k] of one task -> [B, channels, out_size, out_size], activated, channels-last in memory.

    Images smaller than `trunk_size` are first enlarged to it (bilinear); then one convolution (7x7 unless `kernel`
    says otherwise), whose stride brings them to `out_size`, batch norm of the task's own, ReLU.
    """

    def __init__(
        self, task: Task, channels: int, trunk_size: int, out_size: int | None = None, kernel: int = KERNEL
    ) -> None:
        super().__init__()
        self.in_size = max(task.size, trunk_size)
        self.out_size = out_size or trunk_size
        stride, padding = stem_geometry(self.in_size, self.out_size, kernel)
        self.conv = ConvNormReLU(task.channels, channels, kernel, stride, padding)

    def forward(self, images: Tensor) -> Tensor:  # [B, C_k, S_k, S_k] -> [B, channels, out_size, out_size]
        """Bring the images to the trunk's size."""
        return self.conv(enlarge(images, self.in_size))

    def flops(self) -> int:
        """FLOPs of the convolution for one image: twice the multiply-adds."""
        return 2 * self.conv.conv.weight.numel() * self.out_size**2


class ImageStem(nn.Module):
    """No stem: the blocks read the images [B, C_k, S_k, S_k], enlarged to `size` (bilinear) where they are smaller.

    Raises:
        ValueError: images larger than `size`.
    """

    def __init__(self, task: Task, size: int) -> None:
        super().__init__()
        if task.size > size:
            raise ValueError(
                f"backbone: trunk_size must be at least the images' {task.size} of task {task.name!r}"
                f" where there is no stem, got {size}"
            )
        self.in_size = size

    def forward(self, images: Tensor) -> Tensor:  # [B, C_k, S_k, S_k] -> [B, C_k, size, size]
        """Enlarge the images where they are smaller."""
        return enlarge(images, self.in_size).contiguous(memory_format=torch.channels_last)

    def flops(self) -> int:
        """Return 0: nothing is multiplied."""
        return 0


class FeatureNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of features [B, C].  One image or none leave the running statistics as they are.

    One image alone has no statistics of its own: while training, too, it is normed with the running ones.

    Attributes:
        process_group: as of `DynamicBatchNorm2d`: "world" where all processes share their statistics while training.
    """

    process_group: Literal["world"] | None = None

    @property
    def shares(self) -> bool:
        """True where the next call takes its statistics from several processes."""
        return self.process_group is not None and self.training and dist.is_initialized() and dist.get_world_size() > 1

    def forward(self, x: Tensor) -> Tensor:  # [B, C]
        if self.process_group is None or not self.shares:
            if self.training and len(x) == 1:
                return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return super().forward(x) if x.shape[0] else x
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        everything = torch.ones(len(x), dtype=torch.int32, device=x.device)
        y = dynamic_batch_norm(
            x[:, :, None, None], everything, self.weight, self.bias, self.running_mean, self.running_var,
            groups=(self.num_features,), training=True, momentum=self.momentum or 0.0, eps=self.eps,
            process_group=dist.group.WORLD,
        )  # fmt: skip
        return y[:, :, 0, 0]


def last_norm(backbone: Backbone, last: BlockShape) -> nn.BatchNorm2d | None:
    """The batch norm that a pre-activation network ends with; None where fully connected layers read the map."""
    return DynamicBatchNorm2d(last.channels) if backbone.fully_connected is None else None


def shared_layers(backbone: Backbone, last: BlockShape) -> tuple[nn.Sequential, int]:
    """The fully connected layers that all tasks share, maybe none, and how many features they hand to the heads.

    Their weights start from He's initialisation, their biases from zero.
    """
    if backbone.fully_connected is None:
        return nn.Sequential(), last.channels
    features, layers = last.channels * last.size**2, nn.Sequential()
    for width in backbone.fully_connected:
        linear = nn.Linear(features, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers.extend([linear, nn.ReLU(), nn.Dropout(backbone.dropout)])
        features = width
    return layers, features


def features(x: Tensor, norm: nn.BatchNorm2d | None, shared: nn.Sequential) -> Tensor:
    """Features [B, features] that the heads read, of the last map [B, channels, H, W]."""
    x = x.flatten(1) if norm is None else F.relu(norm(x)).mean((2, 3))
    return shared(x)


def linear_flops(layers: Sequence[nn.Module]) -> int:
    """FLOPs of the fully connected layers among `layers` for one image: twice the multiply-adds."""
    return sum(2 * layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
