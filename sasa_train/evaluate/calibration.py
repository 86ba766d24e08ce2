"""Measures of how reliable a classifier's probabilities are: calibration error, Brier score and best temperature.

Calibration is measured on the top-1 confidence in bins of equal width, as in Guo et al. 2017 (arXiv 1706.04599).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

NUM_BINS = 15  # as in the paper
CHUNK = 4096  # images whose float64 probabilities are in memory at the same time


@dataclass(frozen=True)
class Bin:
    """The images with confidence in (`low`, `high`]; values are in percent, and the means of an empty bin are None."""

    low: float
    high: float
    num_images: int
    confidence: float | None
    top1: float | None

    @property
    def gap(self) -> float:
        """The confidence minus the accuracy in percentage points, or 0 for an empty bin."""
        return 0.0 if self.confidence is None or self.top1 is None else self.confidence - self.top1


@dataclass(frozen=True)
class Temperature:
    """The value by which all logits are divided to minimise the NLL, with the resulting NLL and ECE (percent)."""

    value: float
    nll: float
    ece: float


@dataclass(frozen=True)
class Calibration:
    """The `ece`, `mce`, mean `confidence` and `top1` in percent, the `nll` in nats, and the `brier` score from 0 to 2.

    `temperature` is None if there is no best value: all predictions are correct, or uniform probabilities fit better.
    """

    ece: float
    mce: float
    confidence: float
    top1: float
    nll: float
    brier: float
    temperature: Temperature | None
    bins: list[Bin]


def calibrate(logits: Tensor, labels: Tensor, predictions: Tensor, num_bins: int = NUM_BINS) -> Calibration:
    """Measure the calibration of logits [n, num_classes], given int64 labels [n] and predicted classes [n]."""
    is_right = (predictions == labels).numpy()
    confidences = confidences_of(logits, predictions)
    bins = bin_by_confidence(confidences, is_right, num_bins)
    nll, brier = proper_scores(logits, labels)
    ece, mce = expected_error(bins), max(abs(each.gap) for each in bins)
    confidence, top1 = 100 * float(confidences.mean()), 100 * float(is_right.mean())
    temperature = _tempered(logits, labels, predictions, num_bins)
    return Calibration(ece, mce, confidence, top1, nll, brier, temperature, bins)


def confidences_of(logits: Tensor, predictions: Tensor, inverse_temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities of `predictions`, float64 [n]."""
    chunks = _chunks(logits, predictions)
    return torch.cat([(inverse_temperature * z).softmax(1).gather(1, y[:, None])[:, 0] for z, y in chunks]).numpy()


def bin_by_confidence(confidences: np.ndarray, is_right: np.ndarray, num_bins: int) -> list[Bin]:
    """Group images into bins of equal width from 0 to 100 %; a confidence on an edge belongs to the lower bin."""
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(places, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # empty bins divide 0 by 0
        means = 100 * np.bincount(places, weights=confidences, minlength=num_bins) / counts
        hits = 100 * np.bincount(places, weights=is_right, minlength=num_bins) / counts
    return [
        Bin(100 * edges[i], 100 * edges[i + 1], int(n), float(means[i]) if n else None, float(hits[i]) if n else None)
        for i, n in enumerate(counts)
    ]


def expected_error(bins: Sequence[Bin]) -> float:
    """Return the ECE in percent: the absolute gap between a bin's confidence and accuracy, averaged over images."""
    return sum(each.num_images * abs(each.gap) for each in bins) / sum(each.num_images for each in bins)


def proper_scores(logits: Tensor, labels: Tensor, inverse_temperature: float = 1.0) -> tuple[float, float]:
    """Return the mean NLL and the mean Brier score, whose squared errors are summed over all classes (0 to 2)."""
    nll = brier = 0.0
    for z, y in _chunks(logits, labels):
        log_probabilities = (inverse_temperature * z).log_softmax(1)
        of_label = log_probabilities.gather(1, y[:, None])[:, 0]
        nll -= of_label.sum().item()
        brier += (log_probabilities.exp().square().sum(1) - 2 * of_label.exp() + 1).sum().item()
    return nll / len(labels), brier / len(labels)


def best_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature that minimises the NLL, or None if the NLL is lowest in the limit of 0 or infinity."""
    # The NLL is convex in the inverse temperature, so its slope crosses 0 at most once.
    of_label = logits.gather(1, labels[:, None])[:, 0]
    if bool((of_label == logits.max(1).values).all()) or not _slope(0.0, logits, labels) < 0:
        return None
    high = 1.0
    while _slope(high, logits, labels) < 0:
        high *= 2
    return 1 / brentq(_slope, 0.0, high, (logits, labels), xtol=1e-12 * high, rtol=1e-12)


def _tempered(logits: Tensor, labels: Tensor, predictions: Tensor, num_bins: int) -> Temperature | None:
    value = best_temperature(logits, labels)
    if value is None:
        return None
    confidences = confidences_of(logits, predictions, 1 / value)
    bins = bin_by_confidence(confidences, (predictions == labels).numpy(), num_bins)
    return Temperature(value, proper_scores(logits, labels, 1 / value)[0], expected_error(bins))


def _slope(inverse: float, logits: Tensor, labels: Tensor) -> float:
    """Return the derivative of the summed NLL with respect to the inverse temperature, the sum of E[z] - z_label."""
    slope = 0.0
    for z, y in _chunks(logits, labels):
        mean = ((inverse * z).softmax(1) * z).sum(1, keepdim=True)
        slope += (mean - z.gather(1, y[:, None])).sum().item()
    return slope


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for z, y in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        yield z.double(), y
