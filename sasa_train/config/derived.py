"""Values that follow from the keys: image size, crops, micro-batches, steps."""

import dataclasses

from sasa_train.config.keys import DATA_SETS, SMALL_IMAGE, AugmentConfig, DataConfig, TrainConfig, TrainerConfig


def crops_by_padding(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether images are fitted to size once and then cropped after padding, which can be done to whole batches."""
    return resolved_image_size(data) <= SMALL_IMAGE and augment.crop_mode != "resized"


def flips_images(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether training mirrors half of the images: `augment.hflip`, or what suits the set."""
    return augment.hflip if augment.hflip is not None else DATA_SETS[data.name].mirrored


def resolved_image_size(data: DataConfig) -> int:
    return data.image_size or DATA_SETS[data.name].image_size


def expected_num_classes(config: TrainConfig) -> int | None:
    """Return the number of classes; None where neither the config nor the data set's name tells it."""
    return config.model.num_classes or DATA_SETS[config.data.name].num_classes


def micro_batch_size(trainer: TrainerConfig, world_size: int) -> int:
    """Return the images of each process's micro-batch; `auto`, before it is settled, counts as no accumulation."""
    if isinstance(trainer.micro_batch_size, int):
        return trainer.micro_batch_size
    return trainer.global_batch_size // (world_size * trainer.grad_accum_steps)


def accumulation(trainer: TrainerConfig, world_size: int) -> int:
    """Return the micro-batches of each process in a step."""
    return trainer.global_batch_size // (world_size * micro_batch_size(trainer, world_size))


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    planned = config.trainer.epochs * steps_per_epoch
    return min(planned, config.trainer.max_steps or planned)


def with_micro_batch_size(trainer: TrainerConfig, micro_batch_size: int) -> TrainerConfig:
    """Set both keys: the micro-batch, and the accumulation that follows from it for one process."""
    # For one process, whatever their number now, so that a config means the same to any number of them.
    steps = trainer.global_batch_size // micro_batch_size
    return dataclasses.replace(trainer, micro_batch_size=micro_batch_size, grad_accum_steps=steps)
