"""Student's t: the confidence interval of a mean over seeds. In closed form, so that scipy is not needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    return Interval(mean, t_quantile(n - 1) * deviation / math.sqrt(n), n)


@lru_cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's |T| exceeds with probability 1 - confidence: 4.303 for 2 degrees of freedom and 95 %."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(100):  # each halves the interval: to the last digit of a float
        middle = (low + high) / 2
        low, high = (low, middle) if t_probability(middle, degrees) > confidence else (middle, high)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom: Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for i in range(2 + is_odd, degrees + 1, 2):  # cos + 2/3 cos^3 + ..., or 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
        total += term
        term *= cosine**2 * (i - 1) / i
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
