"""Levels of a block: how its hidden channels are cut into ordered channel groups."""

import itertools


def level_fractions(levels: int) -> tuple[float, ...]:
    """Share of the hidden channels that each level keeps: nothing, then halves of the whole.

    ``level_fractions(4) == (0, 1/4, 1/2, 1)`` and ``level_fractions(5) == (0, 1/8, 1/4, 1/2, 1)``
    (paper, section 4.1: the lowest level of a residual block has no convolution group).

    Raises:
        ValueError: fewer than two levels.
    """
    if levels < 2:
        raise ValueError(f"level_fractions: levels must be at least 2 (nothing and everything), got {levels}")
    return (0.0, *(0.5**k for k in range(levels - 2, -1, -1)))


def level_widths(channels: int, levels: int) -> tuple[int, ...]:
    """Channels that each level keeps, rounded down: ``level_widths(64, 4) == (0, 16, 32, 64)``.

    Raises:
        ValueError: fewer than two levels, or so few channels that the lowest group would be empty.
    """
    widths = tuple(int(fraction * channels) for fraction in level_fractions(levels))
    if widths[1] < 1:
        least = 2 ** (levels - 2)
        raise ValueError(f"level_widths: channels must be at least {least} for {levels} levels, got {channels}")
    return widths


def level_groups(channels: int, levels: int) -> tuple[int, ...]:
    """Sizes of the ``levels - 1`` groups, which add up to ``channels``: ``level_groups(64, 4) == (16, 16, 32)``.

    Raises:
        ValueError: as :func:`level_widths`.
    """
    widths = level_widths(channels, levels)
    return tuple(upper - lower for lower, upper in itertools.pairwise(widths))
