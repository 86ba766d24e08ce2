"""The batch plan, which assigns images to the micro-batches of an epoch as a function of (seed, epoch).

Global batches do not depend on the number of processes; each process takes a contiguous share of every batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sasa_train.data.randomness import epoch_order


@dataclass(frozen=True)
class MicroBatch:
    """The `indices` of a micro-batch's images in the data set, and the micro-batch's position in the run."""

    indices: np.ndarray
    epoch: int
    step: int  # of the run, from 0
    number: int  # within the step, over all processes


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one split for process `rank` out of `world_size`."""

    seed: int
    num_images: int
    global_batch_size: int
    grad_accum_steps: int
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size  # the incomplete last batch is dropped

    @property
    def micro_batch_size(self) -> int:
        return self.global_batch_size // (self.world_size * self.grad_accum_steps)

    @property
    def share(self) -> slice:
        """The slice of images that this process evaluates; it may be empty if there are more processes than images."""
        bounds = (self.num_images * n // self.world_size for n in (self.rank, self.rank + 1))
        return slice(*bounds)

    def train(self, epoch: int, first_step: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an epoch, starting at its step `first_step`."""
        order = epoch_order(self.seed, epoch, self.num_images)
        for step in range(first_step, self.steps_per_epoch):
            images = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            cut = images.reshape(self.world_size, self.grad_accum_steps, self.micro_batch_size)
            first_number = self.rank * self.grad_accum_steps
            for number, indices in enumerate(cut[self.rank], start=first_number):
                yield MicroBatch(indices, epoch, epoch * self.steps_per_epoch + step, number)

    def all(self) -> Iterator[MicroBatch]:
        """Yield micro-batches that together contain each image of this process's share once, in order."""
        for start in range(self.share.start, self.share.stop, self.micro_batch_size):
            yield MicroBatch(np.arange(start, min(start + self.micro_batch_size, self.share.stop)), 0, 0, 0)
