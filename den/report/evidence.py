"""The rule for verdicts: what has to be measured before a report may say "yes", in one place for every report.

1. A claim on a difference is judged by its values seed by seed (a paired comparison) and their 95 % interval. "yes" and
   "no" only where the whole interval lies on one side of what is claimed, else "open". One seed has no interval.
2. Nothing good is said of a network that is not clearly above chance: its claims do not hold, whatever else was
   measured.
3. A network that chooses is held against one whose choices were never trained (the null): networks vary without
   having learnt anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from den.evaluate.comparison import Check

CONFIDENCE = 0.95
MARGIN = 0.05  # of the way from chance to always right
DEVIATIONS = 3.0  # of the accuracy that guessing has on as many images


@dataclass(frozen=True)
class Interval:
    """Mean of a value over seeds, with the confidence interval of the mean (Student's t); endless for one seed."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
        """The interval of independent values, one a seed; of none NaN as their mean.

        >>> Interval.of([1.0, 2.0, 3.0]).words()
        '+2.00 [-0.48, +4.48], 3 seeds'
        """
        count = len(values)
        mean = statistics.fmean(values) if count else math.nan
        if count < 2:
            return cls(mean, -math.inf, math.inf, count)
        reach = float(stdtrit(count - 1, (1 + confidence) / 2)) * statistics.stdev(values) / math.sqrt(count)
        return cls(mean, mean - reach, mean + reach, count)

    def above(self, threshold: float = 0.0) -> bool | None:
        """True where the whole interval lies above the threshold, False where it lies below, else None: open."""
        if self.low > threshold:
            return True
        return False if self.high < threshold else None

    def words(self, scale: float = 1.0, digits: int = 2, sign: bool = True) -> str:
        """The interval as text: "+0.50 [+0.10, +0.90], 3 seeds"."""
        if not self.count:
            return "no seed in common"
        mean, low, high = (
            f"{scale * value:{'+' if sign else ''}.{digits}f}" for value in (self.mean, self.low, self.high)
        )
        return f"{mean}, 1 seed, so no interval" if self.count == 1 else f"{mean} [{low}, {high}], {self.count} seeds"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Differences of two runs' values, seed by seed, over the seeds that both have.

    >>> paired({0: 3.0, 1: 5.0, 2: 7.0}, {1: 4.0, 2: 4.0, 9: 0.0})
    [1.0, 3.0]
    """
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def above_chance(accuracy: float, chance: float, images: int) -> bool:
    """Return True where an accuracy on so many images is more than guessing by a margin.

    The margin is the larger of a twentieth of the way from chance to always right and three standard deviations of a
    guesser's accuracy.

    Args:
        accuracy: 0..1.
        chance: accuracy of the best guess that looks at no image, the share of the most frequent class, 0..1.
        images: number of images that the accuracy was measured on.
    """
    deviation = math.sqrt(chance * (1 - chance) / max(images, 1))
    return accuracy > chance + max(MARGIN * (1 - chance), DEVIATIONS * deviation)


def all_of(*verdicts: bool | None) -> bool | None:
    """False where one verdict is False, else None where one is open, else True."""
    return False if False in verdicts else (None if None in verdicts else True)


def judged(
    claim: str,
    values: Sequence[float],
    *,
    above: float = 0.0,
    scale: float = 1.0,
    digits: int = 2,
    sign: bool = True,
    trained: bool = True,
) -> Check:
    """The verdict on the claim that a value, or a difference, lies above a threshold.

    Args:
        values: one a seed, such as those of `paired`; none: open.
        above: the threshold.
        scale, digits, sign: for the words, such as 100 for points.
        trained: False where a network that the claim is on is not above chance: then it does not hold.
    """
    interval = Interval.of(values)
    measured = interval.words(scale, digits, sign)
    if not trained:
        return Check(claim, f"{measured}; not above chance", False)
    return Check(claim, measured, interval.above(above))
