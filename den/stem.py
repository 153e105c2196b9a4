"""The stem of a task: its images, whatever their size, as a map that the shared blocks can read."""

import torch.nn.functional as F
from torch import Tensor, nn

from den.conv_norm import ConvNormReLU
from den.tasks import Task

KERNEL = 7


def stem_geometry(size: int, out_size: int) -> tuple[int, int]:
    """Stride and padding of the 7x7 convolution that takes a ``size`` map (``>= out_size``) to exactly ``out_size``.

    The stride is ``ceil(size / out_size)``. An odd total of padding is rounded up: with a stride of 2 or more the
    convolution drops the row too many by itself.
    ``stem_geometry(96, 32) == (3, 2)``, ``stem_geometry(28, 16) == (2, 5)``.
    """
    stride = -(-size // out_size)
    total = (out_size - 1) * stride + KERNEL - size
    return stride, max(0, -(-total // 2))


class Stem(nn.Module):
    """Images [B, C_k, S_k, S_k] of one task -> [B, channels, out_size, out_size], activated, channels-last in memory.

    Images smaller than ``trunk_size`` are first enlarged to it (bilinear); then one 7x7 convolution, whose stride
    brings them to ``out_size``, batch norm of the task's own, ReLU.
    """

    def __init__(self, task: Task, channels: int, trunk_size: int, out_size: int | None = None) -> None:
        super().__init__()
        self.in_size = max(task.size, trunk_size)
        self.out_size = out_size or trunk_size
        stride, padding = stem_geometry(self.in_size, self.out_size)
        self.conv = ConvNormReLU(task.channels, channels, KERNEL, stride, padding)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] < self.in_size:
            images = enlarge(images, self.in_size)
        return self.conv(images)

    def flops(self) -> int:
        """Twice the multiply-adds of the convolution for one image."""
        return 2 * self.conv.conv.weight.numel() * self.out_size**2


def enlarge(images: Tensor, size: int) -> Tensor:
    """Bilinear interpolation of [B, C, S, S] to [B, C, size, size]; an empty batch stays one."""
    if not len(images):
        return images.new_empty(0, images.shape[1], size, size)
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
