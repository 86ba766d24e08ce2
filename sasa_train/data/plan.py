"""The batch plan, which assigns images to the micro-batches of an epoch as a function of (seed, epoch).

Global batches do not depend on the number of processes; each process takes a contiguous share of every batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sasa_train.data.randomness import balanced_order, epoch_order


@dataclass(frozen=True)
class MicroBatch:
    """The `indices` of a micro-batch's images in the data set, and the micro-batch's position in the run.

    `draws` are the numbers from which their random augmentation follows.
    """

    indices: np.ndarray
    epoch: int
    step: int  # of the run, from 0
    number: int  # within the step, over all processes
    draws: np.ndarray


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one split for process `rank` out of `world_size`.

    labels: the images' classes if these are to be drawn equally often (`data.sampler=balanced`).
    """

    seed: int
    num_images: int
    global_batch_size: int
    grad_accum_steps: int
    rank: int = 0
    world_size: int = 1
    labels: np.ndarray | None = None

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
        if self.labels is None:
            order = draws = epoch_order(self.seed, epoch, self.num_images)
        else:  # an image that is drawn several times is augmented in another way each time
            order, draws = balanced_order(self.seed, epoch, self.labels), np.arange(self.num_images)
        for step in range(first_step, self.steps_per_epoch):
            for number in range(self.grad_accum_steps):
                number += self.rank * self.grad_accum_steps
                start = step * self.global_batch_size + number * self.micro_batch_size
                cut = slice(start, start + self.micro_batch_size)
                yield MicroBatch(order[cut], epoch, epoch * self.steps_per_epoch + step, number, draws[cut])

    def all(self) -> Iterator[MicroBatch]:
        """Yield micro-batches that together contain each image of this process's share once, in order."""
        for start in range(self.share.start, self.share.stop, self.micro_batch_size):
            indices = np.arange(start, min(start + self.micro_batch_size, self.share.stop))
            yield MicroBatch(indices, 0, 0, 0, indices)
