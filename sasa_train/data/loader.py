"""Loaders that yield batches on the device, from a data set kept there (resident) or streamed by worker processes.

An epoch's order is a function of (seed, epoch), so a run that was stopped at any step continues with the next image
without replaying anything. Both loaders yield (images, labels): normalised float32 [B, C, H, W] images, and int64 [B]
labels or, if mixup or cutmix was applied, float32 [B, num_classes].
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sasa_train.config.derived import (
    at_train_size,
    at_val_size,
    crops_by_padding,
    in_pixels,
    input_size,
    total_steps,
)
from sasa_train.config.keys import DataConfig, TrainConfig
from sasa_train.data.class_weights import weights_of
from sasa_train.data.datasets import ImageSet, load_image_sets, load_val_set, mean_std
from sasa_train.data.decoding import WHITE
from sasa_train.data.fingerprint import fingerprints
from sasa_train.data.hf_sets import build_hf
from sasa_train.data.mixing import Mixing
from sasa_train.data.named_sets import build_named
from sasa_train.data.own_sets import build_own
from sasa_train.data.plan import BatchPlan
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.resident import ResidentLoader, decode_all
from sasa_train.data.streaming import StreamingLoader
from sasa_train.data.transforms import Augment, Normalize, pixel_type
from sasa_train.data.workers import check_shared_memory
from sasa_train.device import RunPlan
from sasa_train.machine import available_memory, usable_processors
from sasa_train.models.counting import bought_flops
from sasa_train.processes.ranks import local_rank, local_world_size, world_size
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable, some, warn

RESIDENT_SHARE = 0.25  # of free memory; a larger data set is streamed unless data.resident=true
Loader = ResidentLoader | StreamingLoader


@dataclass
class Loaders:
    """The train and val loaders, both resident or both streaming, and the `fingerprint` of the two sets."""

    train: Loader
    val: Loader
    train_set: ImageSet
    fingerprint: dict[str, Any]
    class_weights: np.ndarray | None = None  # see `weights_of`

    @property
    def classes(self) -> list[str]:
        return self.train_set.classes

    @property
    def kind(self) -> str:
        return "resident" if isinstance(self.train, ResidentLoader) else "streamed"

    def train_names(self, step: int, number: int | None = None) -> list[str]:
        """Return the escaped names of this process's images in step `step` (from 0) or only in micro-batch `number`."""
        epoch, first_step = divmod(step, self.train.plan.steps_per_epoch)
        micros = itertools.islice(self.train.plan.train(epoch, first_step), self.train.plan.grad_accum_steps)
        chosen = [micro.indices for position, micro in enumerate(micros) if number in (None, position)]
        return [printable(self.train_set.name(int(index))) for indices in chosen for index in indices]

    def train_images(self, step: int, number: int) -> Tensor:
        """Reload the images [B, C, H, W] of micro-batch `number` in the run's step `step` (from 0)."""
        epoch, first_step = divmod(step, self.train.plan.steps_per_epoch)
        images, _ = next(itertools.islice(self.train.train_batches(epoch, first_step), number, None))
        return images

    def unreadable(self) -> Iterator[str]:
        """Yield the name of each image that could not be read so far, with the reason."""
        for loader in (self.train, self.val):
            yield from loader.quarantine.lines()

    def close(self) -> None:
        self.train.close()
        self.val.close()


def build_loaders(config: TrainConfig, device: torch.device, memory: int | None = None) -> Loaders:
    """Build train and val loaders for `config`; data that is small relative to `memory` (bytes) stays on the device.

    memory: by default, the device's available memory. If there are several processes, each must pass the minimum over
        all of them, so that they make the same choice.

    Raises:
        ConfigError: the folders are invalid, the data set is smaller than one batch, its class count differs from the
            model's, `trainer.class_weights` names a class that is not there, `data.resident=true` needs more memory
            than available, or shared memory is too small.
    """
    train_set, val_set = load_image_sets(config.data)
    _check_counts(config, train_set)
    class_weights = weights_of(config.trainer, train_set)
    is_resident = _is_resident(config, len(train_set), len(val_set), device, memory)
    train = _build_loader(config, train_set, device, is_resident, split="train")
    val = _build_loader(config, val_set, device, is_resident, split="val")
    _check_queues(config, train, val)
    found, leak = fingerprints(train_set, val_set)
    if leak:
        warn(leak)
    return Loaders(train, val, train_set, found, class_weights)


def build_eval_loader(config: TrainConfig, device: torch.device, classes: Sequence[str]) -> tuple[Loader, ImageSet]:
    """Build the same val loader as `build_loaders`, with the same batches; return it and the val images.

    classes: the trained model's; see `load_val_set`.
    """
    val_set = load_val_set(config.data, classes)
    is_resident = _is_resident(config, 0, len(val_set), device)
    val = _build_loader(config, val_set, device, is_resident, split="val")
    _check_queues(config, val)
    return val, val_set


def build_plain_train_loader(config: TrainConfig, device: torch.device) -> Loader:
    """Build a loader of the train images that reads them as those of val: each once, without augmentation."""
    train_set, _ = load_image_sets(config.data)
    loader = _build_loader(config, train_set, device, _is_resident(config, 0, len(train_set), device), split="val")
    _check_queues(config, loader)
    return loader


def _build_loader(config: TrainConfig, images: ImageSet, device: torch.device, is_resident: bool, split: str) -> Loader:
    run, batch_size = RunPlan(config, device), config.trainer.global_batch_size
    data = at_val_size(config.data) if split == "val" else at_train_size(config.data)
    plan = BatchPlan(config.seed, len(images), batch_size, run.grad_accum_steps, run.rank, run.world_size)
    if split == "train" and config.data.sampler == "balanced":
        plan = dataclasses.replace(plan, labels=images.labels)
    mean, std = mean_std(config.data)
    normalize = Normalize(mean, std, device, config.trainer.channels_last, WHITE[config.data.mode])
    # Val uses none of the transforms, and the user's own code for train need not be there.
    transforms = config.augment if split == "train" else dataclasses.replace(config.augment, target=None)
    augment = Augment(data, transforms, config.seed, mean)
    mixed_steps = 0
    if split == "train":
        num_steps = total_steps(config, plan.steps_per_epoch, bought_flops(config, len(images.classes)))
        mixed_steps = num_steps - config.augment.mix_off_epochs * plan.steps_per_epoch
    mixing = Mixing(config.augment, len(images.classes), config.seed, mixed_steps)
    quarantine = Quarantine(split, len(images), config.data.max_unreadable, images)
    if split == "val":
        plan = dataclasses.replace(plan, global_batch_size=plan.micro_batch_size * run.world_size, grad_accum_steps=1)
    num_workers, timeout = resolved_num_workers(config), config.data.worker_timeout
    if not is_resident:
        return StreamingLoader(images, plan, augment, normalize, mixing, quarantine, num_workers, timeout)
    pixels, labels, is_good = decode_all(images, data, num_workers, timeout, quarantine)
    if split == "train":
        pixels = augment.pad(pixels)
    return ResidentLoader(pixels.to(device), labels.to(device), is_good, plan, augment, normalize, mixing, quarantine)


def _check_queues(config: TrainConfig, *loaders: Loader) -> None:
    # If a run ends within an epoch, the workers of all loaders have queued batches in memory at the same time.
    needed = sum(loader.queue_bytes for loader in loaders if isinstance(loader, StreamingLoader))
    check_shared_memory(needed, resolved_num_workers(config), ", or a smaller micro-batch (trainer.micro_batch_size)")


def check_evaluated(loader: Loader, num_images: int, num_left_out: int) -> None:
    """Raise RuntimeError unless the evaluation counted every image except the `num_left_out` unreadable ones."""
    expected = loader.plan.num_images - num_left_out
    if num_images != expected:
        raise RuntimeError(f"evaluation saw {num_images} images instead of {expected}")


def resolved_num_workers(config: TrainConfig) -> int:
    """Return `data.num_workers` or, if it is null, half of this process's share of the processors (at most 8)."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    return min(8, usable_processors() // (2 * local_world_size()))


def fetch_once(config: TrainConfig) -> None:
    """Download the data set if necessary, in one process per machine, so that the other processes find it on disk."""
    if world_size() == 1 or local_rank() > 0:
        return
    if config.data.name in ("cifar10", "cifar100"):
        load_image_sets(config.data)
    elif config.data.name == "own":
        build_own(config.data)
    elif config.data.name == "torchvision":
        build_named(config.data)
    elif config.data.name == "hf":
        build_hf(config.data)


def _is_resident(
    config: TrainConfig, num_train: int, num_val: int, device: torch.device, memory: int | None = None
) -> bool:
    size, num_images = input_size(config.data), num_train + num_val
    if config.data.resident == "false" or not crops_by_padding(config.data, config.augment):
        return False
    needed = num_train * _padded_bytes(config.data) + num_val * _padded_bytes(at_val_size(config.data))
    memory = available_memory(device) if memory is None else memory
    if config.data.resident == "true" and needed > memory:
        raise ConfigError(
            f"data.resident=true: {num_images:,} images of {in_pixels(size)} need {needed / 2**30:.1f} GiB, but "
            f"{device.type} has {memory / 2**30:.1f} GiB; use data.resident=auto or a subset (data.max_train_images)"
        )
    return config.data.resident == "true" or needed <= RESIDENT_SHARE * memory


def _padded_bytes(data: DataConfig) -> int:
    """Return the size of an image in memory, with padding."""
    channels, height, width = input_size(data)
    padding = 2 * (min(height, width) // 8)
    return channels * (height + padding) * (width + padding) * pixel_type(data).itemsize


def _check_counts(config: TrainConfig, train_set: ImageSet) -> None:
    num_classes = len(train_set.classes)
    if config.model.num_classes not in (None, num_classes):
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but {config.data.name} has {num_classes} classes "
            f"({some(train_set.classes)}); leave model.num_classes=null"
        )
    check_batch(config, len(train_set))


def check_batch(config: TrainConfig, num_images: int) -> None:
    """Raise ConfigError if train has fewer images than a batch."""
    batch = config.trainer.global_batch_size
    if num_images < batch:
        set_keys = ["data.max_train_images"] if config.data.max_train_images == num_images else []
        set_keys += ["data.holdout_fraction"] if config.data.holdout_fraction else []
        left = f" that {' and '.join(set_keys)} leave{'s' * (len(set_keys) == 1)}" if set_keys else ""
        raise ConfigError(
            f"trainer.global_batch_size={batch} exceeds the {num_images} training images{left}, so an epoch would have "
            f"no step; use trainer.global_batch_size={num_images} or less"
        )
