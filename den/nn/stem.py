"""The stem of a task: its images, whatever their size, as a map that the shared blocks can read."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.conv_norm import ConvNormReLU
from den.nn.tasks import Task

KERNEL = 7


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


def enlarge(images: Tensor, size: int) -> Tensor:
    """Interpolate [B, C, S, S] to [B, C, size, size], bilinear, where they are smaller; an empty batch stays empty."""
    if images.shape[-1] >= size:
        return images
    if not images.shape[0]:
        return images.new_empty(0, images.shape[1], size, size)
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
