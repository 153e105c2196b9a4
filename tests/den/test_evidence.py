"""The rule for verdicts: intervals over seeds, paired differences, accuracy above chance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from den.evaluate.comparison import check_lines
from den.report.evidence import Interval, above_chance, all_of, judged, paired

numbers = st.floats(-1e3, 1e3)


@given(st.lists(numbers, min_size=2, max_size=9))
def test_interval_is_students(values):
    found = Interval.of(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    if np.std(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_at_most_one_side_is_decided(values, threshold):
    found = Interval.of(values)
    assert (found.above(threshold) is None) == (found.low <= threshold <= found.high)
    if found.above(threshold) is not None:
        assert found.above(threshold) == (found.mean > threshold)


@pytest.mark.parametrize("values", [[], [5.0], [0.0, 0.0], [3.0, -1.0]])
def test_no_spread_no_seeds_and_much_spread_stay_open(values):
    assert judged("better", values).holds is None


@pytest.mark.parametrize(("values", "holds"), [([1.0, 1.1, 0.9], True), ([-1.0, -1.1, -0.9], False)])
def test_a_difference_that_all_seeds_have_decides(values, holds):
    assert judged("better", values).holds is holds
    assert judged("better", values, trained=False).holds is False


def test_differences_are_of_the_same_seeds():
    assert paired({0: 0.5, 1: 0.7}, {1: 0.6, 2: 0.1}) == [pytest.approx(0.1)]
    assert paired({0: 1.0}, {1: 1.0}) == []


@pytest.mark.parametrize(
    ("accuracy", "chance", "images", "above"),
    [
        (0.0, 0.01, 10_000, False),
        (0.05, 0.01, 10_000, False),  # better than guessing, and nothing to speak of
        (0.07, 0.01, 10_000, True),
        (0.07, 0.01, 10, False),
        (0.6, 0.5, 10_000, True),
        (0.6, 0.5, 100, False),
        (0.92, 0.9, 10_000, True),
        (0.9, 0.9, 10_000, False),  # an unbalanced set, always answered by its most frequent class
        (1.0, 1.0, 10, False),
    ],
)
def test_above_chance(accuracy, chance, images, above):
    assert above_chance(accuracy, chance, images) is above


def test_all_of():
    assert all_of(True, True) is True
    assert all_of(True, None) is None
    assert all_of(None, False, True) is False


def test_words():
    assert Interval.of([0.001, 0.003]).words(100) == "+0.20 [-1.07, +1.47], 2 seeds"
    assert Interval.of([0.5]).words(1, 1, False) == "0.5, 1 seed, so no interval"
    assert Interval.of([]).words() == "no seed in common"
    assert math.isnan(Interval.of([]).mean)
    assert check_lines([judged("a", [1.0]), judged("b", [2.0, 2.1]), judged("c", [-2.0, -2.1])]).splitlines() == [
        "  open  a: +1.00, 1 seed, so no interval",
        "  yes   b: +2.05 [+1.41, +2.69], 2 seeds",
        "  NO    c: -2.05 [-2.69, -1.41], 2 seeds",
    ]
