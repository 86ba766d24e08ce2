"""Batches on the device: from a resident set, augmented as whole tensors, or streamed through worker processes.

An epoch's order is a function of (seed, epoch), so a run that stopped at any step goes on at the next image without
replaying anything. Both loaders yield (images, labels): normalised float32 [B, 3, H, W] and int64 [B].
"""

import atexit
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sasa_train.config import SMALL_IMAGE, ConfigError, TrainConfig, resolved_image_size
from sasa_train.data.datasets import MEAN_STD, ImageSet, load_image_sets
from sasa_train.data.randomness import epoch_order
from sasa_train.data.transforms import Augment, Normalize, fit, to_device

Batch = tuple[Tensor, Tensor]
RESIDENT_SHARE = 0.25  # of the memory: a set larger than that streams, unless data.resident=true


@dataclass
class Loaders:
    """What training needs of the data. `train` and `val` are either both resident or both streamed."""

    train: "ResidentLoader | StreamingLoader"
    val: "ResidentLoader | StreamingLoader"
    classes: list[str]

    @property
    def kind(self) -> str:
        return "resident" if isinstance(self.train, ResidentLoader) else "streamed"

    def close(self) -> None:
        self.train.close()
        self.val.close()


@dataclass(frozen=True)
class BatchPlan:
    """Which images are in which micro-batch, for every epoch."""

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

    def train(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        """Indices of each micro-batch of an epoch, from its step `first_step` on."""
        used = self.steps_per_epoch * self.global_batch_size
        order = epoch_order(self.seed, epoch, self.num_images)[first_step * self.global_batch_size : used]
        return iter(order.reshape(-1, self.micro_batch_size))

    def all(self) -> Iterator[np.ndarray]:
        """Indices of every image once, in order."""
        for start in range(0, self.num_images, self.micro_batch_size):
            yield np.arange(start, min(start + self.micro_batch_size, self.num_images))


class ResidentLoader:
    """The whole set, decoded, on the device; a batch is gathered, cropped and flipped there."""

    def __init__(self, images: Tensor, labels: np.ndarray, plan: BatchPlan, augment: Augment, normalize: Normalize):
        self.images, self.plan, self.augment, self.normalize = images, plan, augment, normalize
        self.labels = torch.from_numpy(labels).to(images.device)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for indices in self.plan.train(epoch, first_step):
            images, labels = self._take(indices)
            yield self.normalize(self.augment.small(images, epoch, indices)), labels

    def eval_batches(self) -> Iterator[Batch]:
        for indices in self.plan.all():
            images, labels = self._take(indices)
            yield self.normalize(images), labels

    def _take(self, indices: np.ndarray) -> Batch:
        where = to_device(indices, self.images.device)
        return self.images[where], self.labels[where]

    def close(self) -> None:
        pass


class StreamingLoader:
    """Images decoded and augmented one by one in worker processes, normalised on the device."""

    def __init__(
        self, images: ImageSet, plan: BatchPlan, augment: Augment, normalize: Normalize, num_workers: int, train: bool
    ):
        self.plan, self.normalize, self.device = plan, normalize, normalize.mean.device
        self._keys: Iterator[list[tuple[int, int]]] = iter(())
        self._loader = DataLoader(
            _StreamedImages(images, augment, train),
            batch_sampler=_Handed(self),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it would draw from the global one, which dropout uses
        )
        atexit.register(self.close)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        return self._batches([(epoch, int(i)) for i in indices] for indices in self.plan.train(epoch, first_step))

    def eval_batches(self) -> Iterator[Batch]:
        return self._batches([(0, int(i)) for i in indices] for indices in self.plan.all())

    def _batches(self, keys: Iterator[list[tuple[int, int]]]) -> Iterator[Batch]:
        self._keys = keys
        try:
            for images, labels in self._loader:
                images = images.to(self.device, non_blocking=True)
                yield self.normalize(images), labels.to(self.device, non_blocking=True)
        except ConfigError as error:  # from a worker it comes with the worker's traceback around it
            raise ConfigError(str(error).strip().splitlines()[-1].rpartition("ConfigError: ")[2]) from None

    def close(self) -> None:
        """End the worker processes: they ignore SIGTERM, and Python waits for them at its end."""
        iterator: Any = self._loader._iterator
        self._loader._iterator = None
        atexit.unregister(self.close)
        if iterator is not None and self._loader.num_workers:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()


class _Handed:
    """The DataLoader's batch sampler: hands out the keys of whatever epoch its owner is in."""

    def __init__(self, owner: StreamingLoader):
        self.owner = owner

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.owner._keys


class _StreamedImages(Dataset):
    def __init__(self, images: ImageSet, augment: Augment, train: bool):
        self.images, self.augment, self.train = images, augment, train

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image = self.images.read(index)
        pixels = self.augment.streamed(image, epoch, index) if self.train else fit(image, self.augment.size)
        return pixels, int(self.images.labels[index])


def build_loaders(config: TrainConfig, device: torch.device) -> Loaders:
    """Load the data that `config` names, resident where it fits, and plan its batches.

    Raises:
        ConfigError: whatever is wrong with the folders, a set smaller than one batch, a class count that is not the
            model's, or `data.resident=true` for images that memory cannot hold.
    """
    train_set, val_set = load_image_sets(config.data)
    _check_counts(config, train_set)
    is_resident = _is_resident(config, len(train_set) + len(val_set), device)
    return Loaders(
        _loader(config, train_set, device, is_resident, split="train"),
        _loader(config, val_set, device, is_resident, split="val"),
        train_set.classes,
    )


def build_eval_loader(
    config: TrainConfig, device: torch.device
) -> tuple["ResidentLoader | StreamingLoader", list[str]]:
    """The val loader of `build_loaders`, with the same batches, and the classes."""
    _, val_set = load_image_sets(config.data)
    return _loader(config, val_set, device, _is_resident(config, len(val_set), device), split="val"), val_set.classes


def _loader(
    config: TrainConfig, images: ImageSet, device: torch.device, is_resident: bool, split: str
) -> "ResidentLoader | StreamingLoader":
    trainer = config.trainer
    plan = BatchPlan(config.seed, len(images), trainer.global_batch_size, trainer.grad_accum_steps)
    if split == "val":
        plan = BatchPlan(config.seed, len(images), plan.micro_batch_size, 1)
    mean, std = MEAN_STD[config.data.name]
    normalize = Normalize(config.data.mean or mean, config.data.std or std, device, trainer.channels_last)
    augment = Augment(config.data, config.augment, config.seed)
    num_workers = resolved_num_workers(config)
    if not is_resident:
        return StreamingLoader(images, plan, augment, normalize, num_workers, train=split == "train")
    pixels = decode_all(images, augment.size, num_workers, split).to(device)
    return ResidentLoader(pixels, images.labels, plan, augment, normalize)


def decode_all(images: ImageSet, size: int, num_workers: int, split: str) -> Tensor:
    """Decode a whole set of small images into uint8 [n, 3, size, size], with a progress bar."""
    if images.arrays is not None and images.arrays.shape[-2:] == (size, size):
        return images.arrays.contiguous()
    loader = DataLoader(
        _Decoded(images, size), batch_size=256, num_workers=num_workers, worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )  # fmt: skip
    pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    with tqdm(total=len(images), desc=f"decoding {split}", unit="img", disable=None, leave=False) as bar:
        done = 0
        for batch in loader:
            pixels[done : done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return pixels


class _Decoded(Dataset):
    def __init__(self, images: ImageSet, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return fit(self.images.read(index), self.size)


def resolved_num_workers(config: TrainConfig) -> int:
    """`data.num_workers`, or half of the processors this process may use, 8 at most."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable // 2)


def _is_resident(config: TrainConfig, num_images: int, device: torch.device) -> bool:
    size = resolved_image_size(config.data)
    if config.data.resident == "false" or size > SMALL_IMAGE:
        return False
    needed = num_images * 3 * size * size
    memory = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if config.data.resident == "true" and needed > memory:
        raise ConfigError(
            f"data.resident=true: {num_images:,} images of {size} pixels need {needed / 2**30:.1f} GiB, but "
            f"{device.type} has {memory / 2**30:.1f} GiB; use data.resident=auto or a subset (data.max_train_images)"
        )
    return config.data.resident == "true" or needed <= RESIDENT_SHARE * memory


def _check_counts(config: TrainConfig, train_set: ImageSet) -> None:
    num_classes, batch = len(train_set.classes), config.trainer.global_batch_size
    if config.model.num_classes not in (None, num_classes):
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but {config.data.name} has {num_classes} classes "
            f"({', '.join(train_set.classes[:5])}{', ...' if num_classes > 5 else ''}); leave model.num_classes=null"
        )
    if len(train_set) < batch:
        raise ConfigError(
            f"trainer.global_batch_size={batch} exceeds the {len(train_set)} training images, so an epoch would have "
            f"no step; use trainer.global_batch_size={len(train_set)} or less"
        )


def _ignore_signals(_worker: int) -> None:
    """Ctrl-C and a scheduler's warning reach the whole process group: the main process alone decides what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
