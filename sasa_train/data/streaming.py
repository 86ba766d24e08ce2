"""A loader whose workers decode and augment whole micro-batches; images stay uint8 until they are on the device."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sasa_train.config.derived import input_size
from sasa_train.data.datasets import ImageSet
from sasa_train.data.mixing import Mixing
from sasa_train.data.plan import BatchPlan, MicroBatch
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import Read, Reader
from sasa_train.data.transforms import Augment, Normalize, pixel_type
from sasa_train.data.workers import Workers, queue_bytes

Batch = tuple[Tensor, Tensor]
Moved = tuple[MicroBatch, Tensor, Tensor]  # images and labels on the device


class StreamingLoader:
    """Reads micro-batches in persistent workers; they are normalised and mixed on the device."""

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
        self.num_left_out = 0  # images in this process's share that the last evaluation left out
        image_bytes = math.prod(input_size(augment.data)) * pixel_type(augment.data).itemsize
        self.queue_bytes = queue_bytes(num_workers, plan.micro_batch_size, plan.num_images, image_bytes)
        reader = Reader(images, augment.data, quarantine.num_tries, augment if quarantine.split == "train" else None)
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
        """Yield the micro-batches after copying them to the device and normalising them."""
        if self.device.type != "cuda":
            yield from map(self._move, self._workers.read(keys))
            return
        # The next batch is copied and normalised on a side stream while the device computes on this one.
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
            tensor.record_stream(current)  # otherwise the allocator could reuse its memory too early
        return moved

    def _move(self, came: tuple[MicroBatch, Read]) -> Moved:
        micro, read = came
        self.quarantine.add(read.unreadable)
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (read.pixels, read.labels))
        return micro, self.normalize(images), labels

    def close(self) -> None:
        """Terminate the worker processes."""
        self._workers.close()
