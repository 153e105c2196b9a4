"""Levels of a block: how its hidden channels are cut into ordered channel groups.

A level is a number of 0..L-1 everywhere: in a structure, from the selector, in the tables of costs. What the lowest
level keeps is a property of the kind of block (paper, section 4.1), called `lowest`, the groups that it keeps:

- 0 for residual blocks, basic and bottleneck: level 0 is the shortcut; L - 1 groups;
- 1 for the pairs of VGG and SimpleConvNet, of convolutions or fully connected layers, which have no shortcut to fall
  back on; L groups.

Level `l` keeps the first `l + lowest` of the `L - 1 + lowest` groups (`Estimator.level_plan`).
"""

import itertools


def level_fractions(levels: int, lowest: int = 0) -> tuple[float, ...]:
    """Share of the hidden channels that each level keeps: halves of the whole, below them nothing if `lowest` is 0.

    `level_fractions(4) == (0, 1/4, 1/2, 1)` and `level_fractions(3, lowest=1) == (1/4, 1/2, 1)`
    (paper, section 4.1: the lowest level of a residual block has no convolution group, that of VGG has one).

    Raises:
        ValueError: fewer than two levels.
    """
    if levels < 2:
        least = "nothing" if lowest == 0 else "half"
        raise ValueError(f"level_fractions: levels must be at least 2 ({least} and everything), got {levels}")
    halves = tuple(0.5**k for k in range(levels - 2 + lowest, -1, -1))
    return halves if lowest else (0.0, *halves)


def level_widths(channels: int, levels: int, lowest: int = 0, unit: int = 1) -> tuple[int, ...]:
    """Channels that each level keeps, rounded down to whole units: `level_widths(64, 4) == (0, 16, 32, 64)`.

    Args:
        channels: a multiple of `unit`.
        lowest: groups that the lowest level keeps, 0 or 1.
        unit: channels that stay together, as those of a cardinality group do.

    Raises:
        ValueError: fewer than two levels, or so few channels that the lowest group would be empty.
    """
    widths = tuple(unit * int(fraction * (channels // unit)) for fraction in level_fractions(levels, lowest))
    if widths[1 - lowest] < 1:
        least = unit * 2 ** (levels - 2 + lowest)
        units = f" in units of {unit}" if unit > 1 else ""
        raise ValueError(f"level_widths: channels must be at least {least}{units} for {levels} levels, got {channels}")
    return widths


def level_groups(channels: int, levels: int, lowest: int = 0, unit: int = 1) -> tuple[int, ...]:
    """Sizes of the `levels - 1 + lowest` groups, adding up to `channels`: `level_groups(64, 4) == (16, 16, 32)`.

    Raises:
        ValueError: as `level_widths`.
    """
    widths = level_widths(channels, levels, lowest, unit)
    return tuple(upper - lower for lower, upper in itertools.pairwise((0, *widths) if lowest else widths))
