"""The confidence interval of a mean over seeds, by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, without the second that importing scipy.stats takes

CONFIDENCE = 0.95
FEW = 5  # below so many seeds the interval rests more on the normal assumption than on the seeds


@dataclass(frozen=True)
class Interval:
    """`mean` +- `half_width` over `n` values; no half width where one value, or none, says nothing about the spread."""

    mean: float
    half_width: float | None
    n: int

    @property
    def excludes_zero(self) -> bool | None:
        return None if self.half_width is None else abs(self.mean) > self.half_width


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value and its 95 % confidence interval: t x s / sqrt(n), s with n - 1."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    t = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Interval(mean, t * deviation / math.sqrt(n), n)
