"""Images decoded and augmented in worker processes, a micro-batch at a time; uint8 until the device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sasa_train.data.datasets import ImageSet
from sasa_train.data.mixing import Mixing
from sasa_train.data.plan import BatchPlan, MicroBatch
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import Read, Unreadable, read_or_replace
from sasa_train.data.transforms import Augment, Normalize
from sasa_train.data.workers import PlainReader, Reader, Workers, queue_bytes

Batch = tuple[Tensor, Tensor]
Moved = tuple[MicroBatch, Tensor, Tensor]  # images and labels on the device


class StreamingLoader:
    """Persistent workers read whole micro-batches; the device normalises and mixes them."""

    def __init__(
        self,
        images: ImageSet,
        plan: BatchPlan,
        augment: Augment,
        normalize: Normalize,
        mixing: Mixing,
        quarantine: Quarantine,
        num_workers: int,
        worker_timeout: float,
    ):
        self.plan, self.normalize, self.mixing, self.quarantine = plan, normalize, mixing, quarantine
        self.device = normalize.mean.device
        self.num_left_out = 0  # by the last evaluation, of this process's share
        self.queue_bytes = queue_bytes(num_workers, plan.micro_batch_size, plan.num_images, augment.size)
        reader: Reader = PlainReader(images, augment.size, quarantine.num_tries)
        if quarantine.split == "train":
            reader = TrainReader(images, augment, quarantine.num_tries)
        is_cuda = self.device.type == "cuda"
        self._workers = Workers(reader, quarantine.split, num_workers, worker_timeout, pin_memory=is_cuda)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for micro, images, labels in self._on_device(self.plan.train(epoch, first_step)):
            yield self.mixing(images, labels, micro.step, micro.number)

    def eval_batches(self) -> Iterator[Batch]:
        self.num_left_out = 0
        for micro, images, labels in self._on_device(self.plan.all()):
            self.num_left_out += len(micro.indices) - len(labels)
            if len(labels):
                yield images, labels

    def _on_device(self, keys: Iterator[MicroBatch]) -> Iterator[Moved]:
        """On CUDA the next batch is copied and normalised on a side stream while this one is computed with."""
        if self.device.type != "cuda":
            yield from map(self._move, self._workers.read(keys))
            return
        side, ahead = torch.cuda.Stream(self.device), None
        for read in self._workers.read(keys):
            with torch.cuda.stream(side):
                following = self._move(read), side.record_event()
            if ahead is not None:
                yield self._hand_over(*ahead)
            ahead = following
        if ahead is not None:
            yield self._hand_over(*ahead)

    def _hand_over(self, moved: Moved, is_there: torch.cuda.Event) -> Moved:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(is_there)
        for tensor in moved[1:]:
            tensor.record_stream(current)  # else its memory is given away while it is still in use
        return moved

    def _move(self, came: tuple[MicroBatch, Read]) -> Moved:
        micro, read = came
        self.quarantine.add(read.unreadable)
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (read.pixels, read.labels))
        return micro, self.normalize(images), labels

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


@dataclass
class TrainReader:
    """Reads a micro-batch for training, augmented."""

    images: ImageSet
    augment: Augment
    num_tries: int

    def __call__(self, micro: MicroBatch) -> Read:
        indices, size = micro.indices, self.augment.size
        pixels, labels = torch.empty((len(indices), size, size, 3), dtype=torch.uint8), np.empty(len(indices), np.int64)
        if get_worker_info() is not None:
            pixels.share_memory_()  # the main process sees it, so that no batch is copied there
        rows, unreadable = pixels.numpy(), list[Unreadable]()
        for row, shape in enumerate(self.augment.shapes(micro.epoch, indices)):
            image, labels[row], met = read_or_replace(self.images, int(indices[row]), shape, self.num_tries)
            unreadable += met
            if image is not None:  # else the quarantine ends the run
                rows[row] = image
        images = self.augment.pad(pixels.permute(0, 3, 1, 2))
        augmented = self.augment.batch(images, np.arange(len(indices)), micro.epoch, indices)
        return Read(augmented, torch.from_numpy(labels), np.arange(len(indices)), unreadable)
