"""The stem of a task: its images, whatever their size, as the map that the states share."""

import torch.nn.functional as F
from torch import Tensor, nn

from den.dag.model_config import DagConfig
from den.dag.pretrained import PretrainedStem
from den.nn.ends import ConvNormReLU
from den.nn.tasks import Task
from den_kernels.building import enlarge


def stem_geometry(size: int, out_size: int) -> tuple[int, int, int]:
    """Kernel, stride and padding of the convolution that takes a map of side ``size >= out_size`` to ``out_size``.

    The kernel is 3, or as wide as the stride where that is more, so that no pixel is left out.
    ``stem_geometry(28, 14) == (3, 2, 1)``, ``stem_geometry(16, 16) == (3, 1, 1)``.
    """
    stride = -(-size // out_size)
    kernel = max(3, stride)
    total = (out_size - 1) * stride + kernel - size
    return kernel, stride, max(0, -(-total // 2))


class DagStem(nn.Module):
    """Images [B, C_k, S_k, S_k] of one task -> [B, channels, trunk_size, trunk_size], channels-last in memory.

    Convolution, batch norm of the task's own, ReLU; images smaller than the trunk are first enlarged (bilinear).
    """

    def __init__(self, task: Task, channels: int, trunk_size: int) -> None:
        super().__init__()
        self.in_size, self.out_size = max(task.size, trunk_size), trunk_size
        self.conv = ConvNormReLU(task.channels, channels, *stem_geometry(self.in_size, trunk_size))

    def forward(self, images: Tensor) -> Tensor:  # [B, C_k, S_k, S_k] -> [B, C, S, S]
        return self.conv(enlarge(images, self.in_size))

    def flops(self) -> int:
        """Twice the multiply-adds of the convolution for one image."""
        return 2 * self.conv.conv.weight.numel() * self.out_size**2


class DenseStem(nn.Module):
    """Images [B, C_k, H, W] of a dense task -> [B, channels, H / 4, W / 4], rounded up, channels-last in memory.

    7x7 convolution of stride 2, batch norm of the task's own, ReLU, 3x3 maximum of stride 2.
    """

    def __init__(self, task: Task, channels: int) -> None:
        super().__init__()
        _, height, width = task.shape
        self.conv = ConvNormReLU(task.channels, channels, 7, 2, 3)
        self._outputs = -(-height // 2) * -(-width // 2)

    def forward(self, images: Tensor) -> Tensor:  # [B, C_k, H, W] -> [B, C, H / 4, W / 4]
        return F.max_pool2d(self.conv(images), 3, 2, 1) if images.shape[0] else self.conv(images)[:, :, ::2, ::2]

    def flops(self) -> int:
        """Twice the multiply-adds of the convolution for one image."""
        return 2 * self.conv.conv.weight.numel() * self._outputs


Stem = DagStem | DenseStem | PretrainedStem


def make_stem(task: Task, config: DagConfig) -> Stem:
    """The stem of a task: its images as maps of the first stage."""
    if config.stem != "conv":
        return PretrainedStem(task, config)
    return DenseStem(task, config.channels) if task.dense else DagStem(task, config.channels, config.map_size()[0])
