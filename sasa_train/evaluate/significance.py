"""Two classifiers on the same images: whether they differ by more than chance in the images explains. Without scipy."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedCounts:
    """Images by which of the two is right."""

    both: int
    only_first: int
    only_other: int
    neither: int

    @property
    def num_images(self) -> int:
        return self.both + self.only_first + self.only_other + self.neither


@dataclass(frozen=True)
class Comparison:
    """All but `counts` and `p` in percent or percentage points: `difference` is the first's top1 less the other's, with
    its 95 % interval from `low` to `high`; `agreement` the images with the same prediction, right or wrong.
    """

    counts: PairedCounts
    top1: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float
    agreement: float


def compare(first: np.ndarray, other: np.ndarray, labels: np.ndarray) -> Comparison:
    """Two classifiers' predictions for the same images in the same order, int64 [n] each."""
    counts = count_pairs(first == labels, other == labels)
    difference, low, high = paired_difference(counts)
    n = counts.num_images
    top1 = 100 * (counts.both + counts.only_first) / n, 100 * (counts.both + counts.only_other) / n
    return Comparison(counts, top1, difference, low, high, mcnemar(counts), 100 * float((first == other).mean()))


def count_pairs(first_is_right: np.ndarray, other_is_right: np.ndarray) -> PairedCounts:
    """bool [n] each, of the same images in the same order."""
    both = int((first_is_right & other_is_right).sum())
    only_first, only_other = int(first_is_right.sum()) - both, int(other_is_right.sum()) - both
    return PairedCounts(both, only_first, only_other, len(first_is_right) - both - only_first - only_other)


def mcnemar(counts: PairedCounts) -> float:
    """McNemar's exact two-sided p: of the images that one alone has right, each is either's with probability 1/2.

    The binomial's tail as a whole number over a power of two, so that the p is right to a float's last digit.
    """
    fewer, discordant = min(counts.only_first, counts.only_other), counts.only_first + counts.only_other
    term = tail = 1
    for k in range(fewer):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def paired_difference(counts: PairedCounts) -> tuple[float, float, float]:
    """Accuracy of the first less the other's, and its 95 % interval, in percentage points.

    Newcombe 1998 (Statistics in Medicine 17, 2635), method 10: Wilson's interval of each accuracy, and their
    correlation. Unlike the normal approximation it also holds for few images and accuracies near 100 %.
    """
    n = counts.num_images
    first, other = counts.both + counts.only_first, counts.both + counts.only_other
    low_1, p_1, high_1 = wilson(first, n)
    low_2, p_2, high_2 = wilson(other, n)
    phi = _correlation(counts)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    difference = p_1 - p_2
    low = difference - distance(p_1 - low_1, high_2 - p_2)
    high = difference + distance(high_1 - p_1, p_2 - low_2)
    return 100 * difference, 100 * low, 100 * high


def wilson(successes: int, n: int) -> tuple[float, float, float]:
    """Low end of Wilson's 95 % score interval, the proportion itself, and the high end."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half_width, p, centre + half_width


def _correlation(counts: PairedCounts) -> float:
    """phi of the 2 x 2 table, where it is positive with Newcombe's correction for continuity."""
    rights = counts.both + counts.only_first, counts.both + counts.only_other
    product = math.prod(right * (counts.num_images - right) for right in rights)
    if product == 0:
        return 0.0
    excess = float(counts.both * counts.neither - counts.only_first * counts.only_other)
    if excess > 0:
        excess = max(excess - counts.num_images / 2, 0.0)
    return excess / math.sqrt(product)
