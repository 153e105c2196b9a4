"""The parts of a dynamic convolution that its segments compute: channels as ranges, instances with one selection."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ._geometry import Geometry
from .plan import Route
from .rows import segments


class ChannelRange(NamedTuple):
    """Consecutive channels."""

    start: int
    width: int


class Part(NamedTuple):
    """The part of a convolution that one selection computes; ranges in ascending order.

    `constant`: selected output channels none of whose inputs is selected, a convolution over nothing: the bias.
    """

    inputs: tuple[ChannelRange, ...]
    outputs: tuple[ChannelRange, ...]
    constant: tuple[ChannelRange, ...]
    groups: int


class SegmentPart(NamedTuple):
    """Instances of one selection, and the part of the convolution that they compute."""

    order: Tensor  # int32 [n]: its instances
    first: int  # their first index where they are neighbours in order, first .. first + n; else -1
    part: Part


def ranges_of(sizes: Sequence[int], selected: Sequence[bool]) -> tuple[ChannelRange, ...]:
    """The channels of the selected groups as maximal ranges.

    >>> ranges_of((2, 3, 4, 1), (True, True, False, True))
    (ChannelRange(start=0, width=5), ChannelRange(start=9, width=1))
    """
    ranges: list[ChannelRange] = []
    start = 0
    for size, chosen in zip(sizes, selected, strict=True):
        if chosen and ranges and ranges[-1].start + ranges[-1].width == start:
            ranges[-1] = ChannelRange(ranges[-1].start, ranges[-1].width + size)
        elif chosen:
            ranges.append(ChannelRange(start, size))
        start += size
    return tuple(ranges)


def _cardinality_used(sizes: Sequence[int], selected: Sequence[bool], channels: int, groups: int) -> list[bool]:
    ranges = ranges_of(sizes, selected) if sizes else (ChannelRange(0, channels),)
    starts = range(0, channels, channels // groups)
    return [any(range_.start <= start < range_.start + range_.width for range_ in ranges) for start in starts]


@lru_cache(maxsize=4096)
def part_of(
    selected: tuple[bool, ...],  # [G]
    in_channels: int,
    out_channels: int,
    groups: int,
    out_sizes: tuple[int, ...],
    in_sizes: tuple[int, ...],
) -> Part:
    """The part of the convolution that a selection computes.

    >>> part_of((True, False), 8, 6, 1, (2, 4), ())
    Part(inputs=(ChannelRange(start=0, width=8),), outputs=(ChannelRange(start=0, width=2),), constant=(), groups=1)
    """
    if groups == 1:
        inputs = ranges_of(in_sizes, selected) if in_sizes else (ChannelRange(0, in_channels),)
        outputs = ranges_of(out_sizes, selected) if out_sizes else (ChannelRange(0, out_channels),)
        return Part(inputs, outputs, (), 1) if inputs and outputs else Part((), (), outputs, 0)
    reads = _cardinality_used(in_sizes, selected, in_channels, groups)
    writes = _cardinality_used(out_sizes, selected, out_channels, groups)
    both = [r and w for r, w in zip(reads, writes, strict=True)]
    bare = [w and not r for r, w in zip(reads, writes, strict=True)]
    in_each, out_each = (in_channels // groups,) * groups, (out_channels // groups,) * groups
    return Part(ranges_of(in_each, both), ranges_of(out_each, both), ranges_of(out_each, bare), sum(both))


def parts_of(route: Route, geometry: Geometry, in_channels: int, out_channels: int) -> list[SegmentPart]:
    """The parts of the convolution that the segments of the route compute, in order."""
    sizes = tuple(geometry.out_sizes), tuple(geometry.in_sizes)
    parts = []
    for start, end, groups in segments(route):
        order = route.order[start:end]
        instances = order.tolist()
        neighbours = instances == list(range(instances[0], instances[0] + end - start))
        part = part_of(groups, in_channels, out_channels, geometry.groups, *sizes)
        parts.append(SegmentPart(order, instances[0] if neighbours else -1, part))
    return parts
