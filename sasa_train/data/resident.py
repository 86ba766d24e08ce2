"""A loader for small images that are decoded once and kept on the device, where batches are gathered and augmented."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sasa_train.config.derived import input_size
from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import ImageSet
from sasa_train.data.mixing import Mixing
from sasa_train.data.plan import BatchPlan
from sasa_train.data.policies import to_device
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import Reader
from sasa_train.data.transforms import Augment, Normalize, pixel_type
from sasa_train.data.workers import Workers, check_shared_memory, queue_bytes
from sasa_train.processes.ranks import rank
from sasa_train.terminal import progress_bar

CHUNK = 256  # images that a worker decodes per task


@dataclass
class ResidentLoader:
    """Builds batches from images [n, C, H, W] (padded in train) and labels [n]; `is_good` marks readable ones."""

    images: Tensor
    labels: Tensor
    is_good: np.ndarray
    plan: BatchPlan
    augment: Augment
    normalize: Normalize
    mixing: Mixing
    quarantine: Quarantine

    @property
    def num_left_out(self) -> int:
        """The number of unreadable images in this process's share, which evaluations skip."""
        return int((~self.is_good[self.plan.share]).sum())

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for micro in self.plan.train(epoch, first_step):
            images = self.augment.batch(self.images, micro.indices, epoch, micro.draws)
            labels = self.labels[to_device(micro.indices, self.images.device)]
            yield self.mixing(self.normalize(images), labels, micro.step, micro.number)

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for micro in self.plan.all():
            where = to_device(micro.indices[self.is_good[micro.indices]], self.images.device)
            if len(where):
                yield self.normalize(self.images[where]), self.labels[where]

    def close(self) -> None:
        pass


def decode_all(
    images: ImageSet, data: DataConfig, num_workers: int, worker_timeout: float, quarantine: Quarantine
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Decode small images, showing progress; return [n, C, H, W], labels [n] and a mask of readable images.

    Raises:
        ConfigError: more images are unreadable than `data.max_unreadable` allows, or shared memory is too small.
        DataWorkerError: a worker was killed or hangs.
    """
    size = input_size(data)
    if isinstance(images.source, Tensor) and images.source.shape[1:] == size and pixel_type(data) == torch.uint8:
        pixels = images.source[torch.from_numpy(images.positions)]
        return pixels, torch.from_numpy(images.labels), np.ones(len(images), dtype=bool)
    pixels, labels = torch.zeros(len(images), *size, dtype=pixel_type(data)), torch.tensor(images.labels)
    is_good = np.zeros(len(images), dtype=bool)
    check_shared_memory(
        queue_bytes(num_workers, CHUNK, len(images), math.prod(size) * pixel_type(data).itemsize), num_workers
    )
    chunks = BatchPlan(0, len(images), CHUNK, 1).all()
    reader = Reader(images, data, quarantine.num_tries)
    is_quiet = True if rank() else None  # None disables the bar unless stderr is a terminal
    bar = progress_bar(total=len(images), desc=f"decoding {quarantine.split}", unit="img", disable=is_quiet)
    with bar, closing(Workers(reader, quarantine.split, num_workers, worker_timeout)) as workers:
        for micro, read in workers.read(chunks):
            quarantine.add(read.unreadable)
            good = micro.indices[read.rows]
            pixels[good], labels[good], is_good[good] = read.pixels, read.labels, True
            bar.update(len(micro.indices))
    return pixels, labels, is_good
