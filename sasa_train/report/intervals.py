"""Confidence intervals: for a mean over seeds, by Student's t distribution, and for a share of images, by Wilson."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# scipy.stats, which has them as t.cdf and t.ppf, takes a second to import.
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
ENOUGH = 3  # with two seeds, the interval reaches 6 times their distance to either side
FEW = 5  # with fewer seeds, the interval relies more on the normality assumption than on the data


@dataclass(frozen=True)
class Interval:
    """The interval `mean` +- `half_width` over `n` values; `half_width` is None for fewer than two values."""

    mean: float
    half_width: float | None
    n: int

    @property
    def is_shown(self) -> bool:
        return self.n >= ENOUGH

    @property
    def bar(self) -> float:
        """Half the length of the interval in a chart, 0 for too few values."""
        return (self.half_width or 0.0) if self.is_shown else 0.0

    @property
    def excludes_zero(self) -> bool | None:
        return None if self.half_width is None else abs(self.mean) > self.half_width


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of one or more values and its 95 % interval, t x s / sqrt(n), where s has the divisor n - 1."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    t = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Interval(mean, t * deviation / math.sqrt(n), n)


def still_exclude_zero(intervals: Sequence[Interval]) -> list[bool]:
    """Whether each interval still excludes 0 after Holm's correction for their number (Holm 1979)."""
    p_values = [_p_value(interval) for interval in intervals]
    found = [False] * len(intervals)
    for rank, i in enumerate(sorted(range(len(intervals)), key=p_values.__getitem__)):
        if p_values[i] * (len(intervals) - rank) >= 1 - CONFIDENCE:
            break
        found[i] = True
    return found


def _p_value(interval: Interval) -> float:
    """Return the two-sided p value of Student's t test that the mean is 0."""
    if interval.half_width is None:
        return 1.0
    if interval.half_width == 0:
        return 0.0 if interval.mean else 1.0
    t = interval.mean / interval.half_width * stdtrit(interval.n - 1, (1 + CONFIDENCE) / 2)
    return float(2 * stdtr(interval.n - 1, -abs(t)))


def half_width(top1: float, num_images: int) -> float:
    """Return half the width of the 95 % interval (Wilson's) that so many images leave for a top1, both in percent."""
    p, z2 = top1 / 100, 1.96**2
    return 100 * 1.96 * math.sqrt((p * (1 - p) + z2 / (4 * num_images)) / num_images) / (1 + z2 / num_images)


def exactness(top1: float, num_images: int) -> str:
    """Say how exact a run's top1 is on so many val images."""
    points = half_width(top1, num_images)
    return f"on {num_images:,} val images, one run's top1 is accurate to about ± {points:.2g} points"
