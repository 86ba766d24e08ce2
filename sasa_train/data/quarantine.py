"""Unreadable images, which are logged once, counted, and replaced or left out; if there are too many, the run stops."""

import logging
import math

import numpy as np

from sasa_train.data.datasets import ImageSet
from sasa_train.data.decoding import RANGE_REMEDY
from sasa_train.data.reading import Unreadable
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable, some

log = logging.getLogger("sasa_train")

ALWAYS_ALLOWED = 10  # in a small data set, a few unreadable images do not indicate a broken disk


def fully(labels: np.ndarray, is_marked: np.ndarray, num_classes: int) -> list[int]:
    """Return the labels of which all images are marked, and at least one; `labels`, int64 [n], and `is_marked` [n]."""
    counts, marked = (np.bincount(part, minlength=num_classes) for part in (labels, labels[is_marked]))
    return np.flatnonzero((counts > 0) & (counts == marked)).tolist()


class Quarantine:
    """The unreadable images found so far in one split."""

    def __init__(self, split: str, num_images: int, max_unreadable: float, images: ImageSet | None = None):
        """Create an empty quarantine for `num_images` images; classes are named only if `images` is given."""
        self.split, self.images, self.found, self.lost = split, images, dict[str, str](), set[str]()
        self.allowed_share = math.floor(max_unreadable * num_images)
        allowed = max(ALWAYS_ALLOWED, self.allowed_share) if max_unreadable else 0
        self.allowed = min(allowed, num_images - 1)  # at least one image must be readable
        # In train, the search for a replacement ends when more images are unreadable than allowed. In val, images are
        # not replaced.
        self.num_tries = self.allowed + 1 if split == "train" else 1
        self.rule = f"data.max_unreadable={max_unreadable:g} allows {self.allowed} of {num_images:,} images"

    def add(self, unreadable: list[Unreadable]) -> None:
        """Record unreadable images, then check that there are not too many.

        Raises:
            ConfigError: more images are unreadable than `data.max_unreadable` allows; the message lists them.
        """
        self.note(unreadable)
        self.check()

    def note(self, unreadable: list[Unreadable]) -> None:
        """Record unreadable images and log those not seen before, and classes of which none is left."""
        num_before = len(self.found)
        for name, reason in unreadable:
            if name not in self.found:
                self.found[name] = reason
                what = "replaced by the next image" if self.split == "train" else "left out"
                log.warning(f"WARNING: {printable(name)}: cannot be read as an image ({printable(reason)}); {what}")

        if len(self.found) > num_before and (lost := sorted(self._lost_classes() - self.lost)):
            self.lost.update(lost)
            log.warning(f"WARNING: no image of {some(lost)} in {self.split} can be read; repair them (see above)")

    def _lost_classes(self) -> set[str]:
        """Return the names of the classes of which all images were found to be unreadable."""
        if self.images is None:
            return set()
        labels, num_classes = self.images.labels, len(self.images.classes)
        counts = np.bincount(labels, minlength=num_classes)
        # Most classes have more images than were found, so that their names need not be compared.
        of_few = np.flatnonzero(counts[labels] <= len(self.found))
        is_found = np.zeros(len(labels), dtype=bool)
        is_found[of_few] = [self.images.name(i) in self.found for i in of_few.tolist()]
        return {self.images.classes[label] for label in fully(labels, is_found, num_classes)}

    def check(self) -> None:
        """Raise ConfigError if more images are unreadable than `data.max_unreadable` allows."""
        # These are no accidents: every image of a class or source may need the key, so the usual ten are not allowed.
        undecided = self.lines(RANGE_REMEDY)
        if len(undecided) > self.allowed_share:
            number, listing = len(undecided), "\n".join(undecided)
            raise ConfigError(
                f"{number} images of {self.split} cannot be read without data.value_range=[low,high]:\n{listing}\n"
                "set it, or remove them"
            )
        if len(self.found) > self.allowed:
            listing = "\n".join(self.lines())
            raise ConfigError(
                f"{len(self.found)} images of {self.split} cannot be read, but {self.rule}:\n{listing}\n"
                "repair or remove them (sasa-data verify finds them all), or allow more"
            )

    def lines(self, part: str = "") -> list[str]:
        """Return the escaped name and reason for each unreadable image whose reason contains `part`."""
        return [f"{printable(name)}: {printable(reason)}" for name, reason in self.found.items() if part in reason]
