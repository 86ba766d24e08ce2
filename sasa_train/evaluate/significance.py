"""Significance tests for the difference between two classifiers evaluated on the same images."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedCounts:
    """The numbers of images that were predicted correctly by both, only one or neither of two classifiers."""

    both: int
    only_first: int
    only_other: int
    neither: int

    @property
    def num_images(self) -> int:
        return self.both + self.only_first + self.only_other + self.neither

    @property
    def num_right(self) -> tuple[int, int]:
        """The numbers of images that the first and the other classifier predicted correctly."""
        return self.both + self.only_first, self.both + self.only_other


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison, in percent or percentage points except for `counts` and `p`.

    `difference` is the first top1 minus the second, with the 95 % confidence interval from `low` to `high`; `agreement`
    is the share of images with identical predictions, right or wrong.
    """

    counts: PairedCounts
    top1: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float
    agreement: float


def compare(first: np.ndarray, other: np.ndarray, labels: np.ndarray) -> Comparison:
    """Compare the int64 predictions [n] of two classifiers for the same images in the same order."""
    first_is_right, other_is_right = first == labels, other == labels
    groups = (
        first_is_right & other_is_right, first_is_right & ~other_is_right,
        ~first_is_right & other_is_right, ~first_is_right & ~other_is_right,
    )  # fmt: skip
    counts = PairedCounts(*(int(group.sum()) for group in groups))
    first_top1, other_top1 = (100 * right / counts.num_images for right in counts.num_right)
    agreement = 100 * float((first == other).mean())
    return Comparison(counts, (first_top1, other_top1), *paired_difference(counts), mcnemar(counts), agreement)


def mcnemar(counts: PairedCounts) -> float:
    """Return the two-sided p-value of McNemar's exact test, a binomial test on images that only one model got right."""
    fewer, discordant = min(counts.only_first, counts.only_other), counts.only_first + counts.only_other
    return min(1.0, 2 * float(binom.cdf(fewer, discordant, 0.5)))


def paired_difference(counts: PairedCounts) -> tuple[float, float, float]:
    """Return the first accuracy minus the second, and the limits of its 95 % interval, in percentage points.

    Method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635) combines the Wilson intervals of both accuracies with
    their correlation. Unlike the normal approximation, it is valid with few images and for accuracies near 100 %.
    """
    n, rights = counts.num_images, counts.num_right
    p_1, p_2 = (right / n for right in rights)
    wilson_1, wilson_2 = (binomtest(right, n).proportion_ci(CONFIDENCE, "wilson") for right in rights)
    phi = _correlation(counts)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    difference = p_1 - p_2
    low = difference - distance(p_1 - wilson_1.low, wilson_2.high - p_2)
    high = difference + distance(wilson_1.high - p_1, p_2 - wilson_2.low)
    return 100 * difference, 100 * float(low), 100 * float(high)


def _correlation(counts: PairedCounts) -> float:
    """Return the phi coefficient of the 2 x 2 table, with Newcombe's continuity correction if it is positive."""
    product = math.prod(right * (counts.num_images - right) for right in counts.num_right)
    if product == 0:
        return 0.0
    excess = float(counts.both * counts.neither - counts.only_first * counts.only_other)
    if excess > 0:
        excess = max(excess - counts.num_images / 2, 0.0)
    return excess / math.sqrt(product)
