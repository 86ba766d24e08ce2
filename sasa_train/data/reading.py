"""Functions that read images, for data workers and for the commands that show or classify images."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sasa_train.config.derived import at_val_size, input_size
from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import Files, ImageSet, UnreadableImage
from sasa_train.data.plan import MicroBatch
from sasa_train.data.transforms import Augment, Shape, pixel_type, val_shape

Unreadable = tuple[str, str]  # name and reason
Found = tuple[np.ndarray | None, int, list[Unreadable]]


class Read(NamedTuple):
    """The readable images of a batch, [n, C, H, W] (see `pixel_type`), and their labels, int64 [n].

    `rows`, int64 [n], gives their positions in the batch; `unreadable` lists the other images with the reasons.
    """

    pixels: Tensor
    labels: Tensor
    rows: np.ndarray
    unreadable: list[Unreadable]


def image_files(paths: Sequence[str]) -> ImageSet:
    """Create an image set from file paths; every label is -1."""
    return ImageSet([], np.full(len(paths), -1), np.arange(len(paths)), Files(list(paths)))


def read_fitted(images: ImageSet, indices: Iterable[int], data: DataConfig, num_tries: int = 1) -> Read:
    """Read the images at `indices`, resizing and cropping the centre as `data` sets for validation.

    An unreadable image is left out or, if `num_tries` exceeds 1, replaced by the next readable one.
    """
    data = at_val_size(data)
    shape = val_shape(data)
    found = (read_or_replace(images, int(i), shape, num_tries) for i in indices)
    return _gather(found, data)


def read_batches(batches: Iterable[ImageSet], data: DataConfig, num_threads: int = 1) -> Iterator[Read]:
    """Read each image set of `batches` as one batch; threads read one batch ahead of the caller."""
    # Threads suffice because Pillow releases the GIL while it decodes and resizes.
    pool, waiting = ThreadPoolExecutor(max(1, num_threads)), deque[Iterator[Found]]()
    data = at_val_size(data)
    shape = val_shape(data)
    try:
        for images in batches:
            waiting.append(pool.map(partial(read_or_replace, images, shape=shape), range(len(images))))
            if len(waiting) > 1:
                yield _gather(waiting.popleft(), data)
        for last in waiting:
            yield _gather(last, data)
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(images: ImageSet, batch_size: int) -> Iterator[ImageSet]:
    """Split an image set into consecutive parts of `batch_size` images."""
    for start in range(0, len(images), batch_size):
        yield images.subset(np.arange(start, min(start + batch_size, len(images))))


def _gather(found: Iterable[Found], data: DataConfig) -> Read:
    everything = list(found)
    rows = np.array([row for row, (image, *_) in enumerate(everything) if image is not None], dtype=np.int64)
    pixels, labels = empty_pixels(len(rows), data), np.empty(len(rows), dtype=np.int64)
    for to, row in enumerate(rows):
        pixels.numpy()[to], labels[to], _ = everything[row]
    unreadable = [one for *_, met in everything for one in met]
    return Read(pixels.permute(0, 3, 1, 2), torch.from_numpy(labels), rows, unreadable)


def empty_pixels(count: int, data: DataConfig) -> Tensor:
    """Return memory for the pixels of `count` images, [count, H, W, C]."""
    channels, height, width = input_size(data)
    return torch.empty((count, height, width, channels), dtype=pixel_type(data))


def read_or_replace(images: ImageSet, index: int, shape: Shape, num_tries: int = 1) -> Found:
    """Return (pixels, label, unreadable) for the first readable one among `num_tries` images, starting at `index`.

    If none is readable, the pixels are None; `unreadable` lists the skipped images for the quarantine.
    """
    unreadable: list[Unreadable] = []
    # The next image is used so that a replacement depends only on the files, not on workers, order or interruptions.
    for candidate in range(index, index + num_tries):
        at = candidate % len(images)
        try:
            return images.read(at, shape), int(images.labels[at]), unreadable
        except UnreadableImage as error:
            unreadable.append((error.name, error.reason))
    return None, -1, unreadable


@dataclass
class Reader:
    """Reads micro-batches in a worker, and augments them for training unless `augment` is None (for validation)."""

    images: ImageSet
    data: DataConfig
    num_tries: int
    augment: Augment | None = None

    def __call__(self, micro: MicroBatch) -> Read:
        indices = micro.indices
        if self.augment is None:
            return read_fitted(self.images, indices, self.data, self.num_tries)
        pixels, labels = empty_pixels(len(indices), self.data), np.empty(len(indices), np.int64)
        if get_worker_info() is not None:
            pixels.share_memory_()  # shared with the main process, so that the batch is not copied
        rows, unreadable = pixels.numpy(), list[Unreadable]()
        for row, shape in enumerate(self.augment.shapes(micro.epoch, micro.draws)):
            image, labels[row], met = read_or_replace(self.images, int(indices[row]), shape, self.num_tries)
            unreadable += met
            if image is not None:  # otherwise the quarantine stops the run
                rows[row] = image
        images = self.augment.pad(pixels.permute(0, 3, 1, 2))
        augmented = self.augment.batch(images, np.arange(len(indices)), micro.epoch, micro.draws)
        return Read(augmented, torch.from_numpy(labels), np.arange(len(indices)), unreadable)
