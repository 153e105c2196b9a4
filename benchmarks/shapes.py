"""Shapes of the convolution and block cases, as their names say them: "64x32x32", "64-128x32x32/2"."""

from __future__ import annotations

import re
from typing import NamedTuple

# The blocks of WRN-32-4 and ResNet-42: all but the last two, and all but the first.
NETWORKS = (
    *("16-64x32x32", "64x32x32", "64-128x32x32/2", "128x16x16", "128-256x16x16/2", "256x8x8"),
    *("256-512x8x8/2", "512x4x4"),
)
GPU_MIXES = ("full", "uniform", "quarter", "zero")


class Shape(NamedTuple):
    """A 3 x 3 convolution, or the first one of a block."""

    channels: int
    out_channels: int
    size: int  # of the input map
    stride: int = 1

    @classmethod
    def parse(cls, name: str) -> Shape:
        """The shape of a name.

        >>> Shape.parse("64-128x32x32/2")
        Shape(channels=64, out_channels=128, size=32, stride=2)
        """
        channels, out, size, stride = re.fullmatch(r"(\d+)(?:-(\d+))?x(\d+)x\d+(?:/(\d+))?", name).groups()
        return cls(int(channels), int(out or channels), int(size), int(stride or 1))

    @property
    def groups(self) -> tuple[int, int, int]:
        """Output or hidden channel groups of a quarter, a quarter and a half."""
        quarter = self.out_channels // 4
        return quarter, quarter, self.out_channels - 2 * quarter

    @property
    def keeps(self) -> bool:
        """True where the output is as large as the input."""
        return self.channels == self.out_channels and self.stride == 1

    def values(self, batch: int) -> int:
        """Number of values in the larger of the block's two maps, for a batch."""
        return batch * max(self.channels, self.out_channels) * self.size**2
