"""What follows from the keys: image size, crops, micro-batches, steps."""

import dataclasses

from sasa_train.config.keys import DATA_SETS, SMALL_IMAGE, AugmentConfig, DataConfig, TrainConfig, TrainerConfig


def crops_by_padding(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether images are fitted to size once and then cropped after padding, which whole batches can be."""
    return resolved_image_size(data) <= SMALL_IMAGE and augment.crop_mode != "resized"


def flips_images(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether training mirrors half of the images: as `augment.hflip` says, or as suits the set."""
    return augment.hflip if augment.hflip is not None else DATA_SETS[data.name].mirrored


def resolved_image_size(data: DataConfig) -> int:
    return data.image_size or DATA_SETS[data.name].image_size


def expected_num_classes(config: TrainConfig) -> int | None:
    """As the config says; of a set of one's own that it says nothing of, None."""
    return config.model.num_classes or DATA_SETS[config.data.name].num_classes


def micro_batch_size(trainer: TrainerConfig, world_size: int) -> int:
    """Images of each process's micro-batch; `auto`, before it is settled, counts as no accumulation."""
    if isinstance(trainer.micro_batch_size, int):
        return trainer.micro_batch_size
    return trainer.global_batch_size // (world_size * trainer.grad_accum_steps)


def accumulation(trainer: TrainerConfig, world_size: int) -> int:
    """Micro-batches of each process in a step."""
    return trainer.global_batch_size // (world_size * micro_batch_size(trainer, world_size))


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    planned = config.trainer.epochs * steps_per_epoch
    return min(planned, config.trainer.max_steps or planned)


def with_micro_batch_size(trainer: TrainerConfig, micro_batch_size: int) -> TrainerConfig:
    """Both keys set: the micro-batch, and the accumulation that follows from it for one process.

    Not for as many as there are now, so that a config means the same to any number of them.
    """
    steps = trainer.global_batch_size // micro_batch_size
    return dataclasses.replace(trainer, micro_batch_size=micro_batch_size, grad_accum_steps=steps)
