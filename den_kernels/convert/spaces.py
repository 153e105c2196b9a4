"""Hidden channels that are switched together, and how they are divided into channel groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .rules import Unfit


@dataclass(eq=False)
class Space:
    """The channels of one hidden map, and of all maps that follow it channel by channel.

    A unit is what cannot be divided: one channel, or those of one cardinality group of a grouped convolution that reads
    or writes the map. Every map of a space has the same number of units, each of as many channels as divide it.
    """

    units: int

    def coarsen(self, units: int) -> None:
        """Fewer and larger units: those of a grouped convolution. Raises Unfit where they do not divide each other."""
        fine, coarse = max(units, self.units), min(units, self.units)
        if fine % coarse:
            raise Unfit(f"its cardinalities {self.units} and {units} do not divide each other")
        self.units = coarse

    def sizes(self, channels: int, shares: Sequence[float]) -> tuple[int, ...]:
        """The channel groups of a map of the space.

        >>> Space(8).sizes(16, (1, 1, 2))
        (4, 4, 8)

        Raises Unfit where a group would have no unit.
        """
        total = sum(shares)
        ends = [0, *(round(self.units * end / total) for end in accumulate(shares))]
        parts = [high - low for low, high in pairwise(ends)]
        if min(parts) < 1:
            raise Unfit(f"{self.units} units of hidden channels cannot be divided into groups of shares {list(shares)}")
        return tuple(part * (channels // self.units) for part in parts)
