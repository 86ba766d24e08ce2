"""What guessing would reach, against which every top1 is judged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEW = 400  # steps after which a net may not have learned much yet; own images get 1,200
WILD = 1.5  # times the loss of guessing: a higher one at the end has blown up
FAR = 3  # times the loss of guessing: a higher one at any time shows steps that are far too long


def remedy(lr: float, steps: int, losses: Sequence[float | None], num_classes: int) -> str:
    """Say what to try first where a net is not above chance after `steps`.

    losses: the val loss of each evaluation; None where it was not finite.
    """
    lower = f"a lower optimizer.lr (now {lr:g}) is the first thing to try"
    finite, guessing = [loss for loss in losses if loss is not None], math.log(num_classes)
    if finite and max(finite) > FAR * guessing:
        high = f"val loss was up to {max(finite):,.2f}, and guessing has {guessing:.2f}"
        return f"{high}, so the steps are too long: {lower}"
    if steps < FEW and losses and losses[-1] is not None and losses[-1] < WILD * guessing:
        return f"{steps:,} steps are few, so train longer (trainer.epochs=...) first"
    return f"{lower}; then check the labels, or train longer"


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

    def error(self, top1: float) -> float:
        """Return the standard error of a top1 on as many images, in points; 0 if their number is unknown."""
        return math.sqrt(top1 * (100 - top1) / self.num_images) if self.num_images else 0.0

    def explains(self, top1: float) -> bool:
        """Whether guessing reaches `top1` on as many images with a probability above one in forty."""
        return top1 <= self.top1 + 1.96 * self.error(self.top1)
