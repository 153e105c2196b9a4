"""Levels and the groups of channels they are made of."""

import pytest

from den.nn.levels import level_fractions, level_groups, level_widths


@pytest.mark.parametrize(
    ("levels", "fractions"),
    [(2, (0, 1)), (3, (0, 0.5, 1)), (4, (0, 0.25, 0.5, 1)), (5, (0, 0.125, 0.25, 0.5, 1))],
)
def test_fractions_are_nothing_and_halves_of_the_whole(levels, fractions):
    assert level_fractions(levels) == fractions


def test_the_groups_of_the_paper():
    assert level_groups(64, 4) == (16, 16, 32)
    assert level_groups(64, 2) == (64,)
    assert level_groups(64, 5) == (8, 8, 16, 32)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [8, 9, 10, 63, 64, 129, 1134])
def test_groups_are_positive_and_add_up(channels, levels):
    groups = level_groups(channels, levels)
    assert len(groups) == levels - 1
    assert sum(groups) == channels
    assert min(groups) >= 1
    widths = level_widths(channels, levels)
    assert widths == tuple(sum(groups[:level]) for level in range(levels))
    for width, fraction in zip(widths, level_fractions(levels), strict=True):
        assert abs(width - fraction * channels) < 1


def test_a_single_level_is_refused():
    with pytest.raises(ValueError, match="levels must be at least 2"):
        level_fractions(1)


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="channels must be at least 8 for 5 levels, got 7"):
        level_groups(7, 5)
