"""What guessing would reach, against which every top1 is judged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chance:
    """The top1 in percent of always naming the class with the most val images; `num_images` is 0 if unknown."""

    top1: float
    num_classes: int
    num_images: int = 0

    def __str__(self) -> str:
        is_even = math.isclose(self.top1 * self.num_classes, 100)
        return f"chance ({self.top1:.2f} %: {'' if is_even else 'the most frequent of '}{self.num_classes:,} classes)"

    @classmethod
    def among(cls, counts: Sequence[int]) -> "Chance":
        """Return chance on val images of which each class has so many."""
        return cls(100 * max(counts) / sum(counts), len(counts), sum(counts))

    def explains(self, top1: float) -> bool:
        """Whether guessing reaches `top1` on as many images with a probability above one in forty."""
        deviation = math.sqrt(self.top1 * (100 - self.top1) / self.num_images) if self.num_images else 0.0
        return top1 <= self.top1 + 1.96 * deviation
