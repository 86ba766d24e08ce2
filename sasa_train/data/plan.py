"""Which images are in which micro-batch, for every epoch: a function of (seed, epoch)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sasa_train.data.randomness import epoch_order


@dataclass(frozen=True)
class MicroBatch:
    """`indices` of the set's images, and where in the run they belong."""

    indices: np.ndarray
    epoch: int
    step: int  # of the run, from 0
    number: int  # within the step


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one split."""

    seed: int
    num_images: int
    global_batch_size: int
    grad_accum_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size  # the incomplete last batch is dropped

    @property
    def micro_batch_size(self) -> int:
        return self.global_batch_size // self.grad_accum_steps

    def train(self, epoch: int, first_step: int) -> Iterator[MicroBatch]:
        """The micro-batches of an epoch, from its step `first_step` on."""
        order = epoch_order(self.seed, epoch, self.num_images)
        for step in range(first_step, self.steps_per_epoch):
            images = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            for number, indices in enumerate(images.reshape(-1, self.micro_batch_size)):
                yield MicroBatch(indices, epoch, epoch * self.steps_per_epoch + step, number)

    def all(self) -> Iterator[MicroBatch]:
        """Every image once, in order."""
        for start in range(0, self.num_images, self.micro_batch_size):
            yield MicroBatch(np.arange(start, min(start + self.micro_batch_size, self.num_images)), 0, 0, 0)
