"""A block as data: sizes, widths of its levels, and costs; every kind of block has a class of these."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from den.nn.levels import level_groups, level_widths


@dataclass(frozen=True)
class BlockShape(ABC):
    """One block: `[in_channels, in_size, in_size]` maps in, `[channels, size, size]` out, elastic between.

    Attributes:
        hidden: channels between the convolutions, of which a level keeps the first.
        lowest: hidden channel groups that level 0 keeps (see `den.nn.levels`).
    """

    in_channels: int
    hidden: int
    channels: int
    in_size: int
    lowest: ClassVar[int] = 0

    @property
    @abstractmethod
    def size(self) -> int:
        """Side of the map that the block writes."""

    @property
    def unit(self) -> int:
        """Hidden channels that a level keeps or drops together."""
        return 1

    @abstractmethod
    def convolutions(self, width: int) -> tuple[tuple[int, int], ...]:
        """Weights of each convolution when `width` hidden channels are in use, and the side of the map it writes.

        A fully connected layer is one that writes a map of side 1.
        """

    @abstractmethod
    def build(self, levels: int, first: bool = False) -> nn.Module:
        """The module, with new weights; `first`: it reads the stem, whose output is activated already."""

    def parameters(self, width: int) -> int:
        """Weights in use when `width` hidden channels are (batch norms and biases are counted apart)."""
        return sum(weights for weights, _ in self.convolutions(width))

    def flops(self, width: int) -> int:
        """Twice the multiply-adds of the convolutions for one image."""
        return 2 * sum(weights * size**2 for weights, size in self.convolutions(width))

    def widths(self, levels: int) -> tuple[int, ...]:
        """Hidden channels that each of `levels` levels keeps. Raises ValueError if they cannot be cut so."""
        return level_widths(self.hidden, levels, self.lowest, self.unit)

    def groups(self, levels: int) -> tuple[int, ...]:
        """Sizes of the hidden channel groups of `levels` levels. Raises ValueError if they cannot be cut so."""
        return level_groups(self.hidden, levels, self.lowest, self.unit)
