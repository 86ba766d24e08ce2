"""Values derived from the keys: image size, crops, micro-batches and steps."""

import dataclasses
from collections.abc import Sequence

from sasa_train.config.keys import (
    DATA_SETS,
    MODES,
    SMALL_IMAGE,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    TrainerConfig,
)
from sasa_train.refusal import require

InputSize = tuple[int, int, int]  # channels, height and width of the model's input


def crops_by_padding(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether images are resized once and then padded and cropped in whole batches."""
    return resolved_image_size(data) <= SMALL_IMAGE and augment.crop_mode != "resized"


def flips_images(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether training mirrors half of the images, as set by `augment.hflip` or, if null, by the data set's default."""
    return augment.hflip if augment.hflip is not None else DATA_SETS[data.name].mirrored


def resolved_size(data: DataConfig) -> tuple[int, int]:
    """Return the height and width in pixels of the images that the model is built for and trained on."""
    size = data.image_size or DATA_SETS[data.name].image_size
    return (size[0], size[1]) if isinstance(size, list) else (size, size)


def at_val_size(data: DataConfig) -> DataConfig:
    """Return the same keys for images of the size that evaluations and all commands use, `data.val_image_size`."""
    return dataclasses.replace(data, image_size=data.val_image_size or data.image_size, val_image_size=None)


def at_train_size(data: DataConfig) -> DataConfig:
    """Return the same keys for images of the size that training uses, for val, too."""
    return dataclasses.replace(data, val_image_size=None)


def resolved_image_size(data: DataConfig) -> int:
    """Return the longer side, which decides whether images are small."""
    return max(resolved_size(data))


def kernel_sizes(model: ModelConfig) -> list[int]:
    """Return the window sizes that `model.kernel_size` gives: none (null), one, or one per stage."""
    given = model.kernel_size
    return given if isinstance(given, list) else [] if given is None else [given]


def input_size(data: DataConfig) -> InputSize:
    return (MODES[data.mode], *resolved_size(data))


def as_input_size(size: int | InputSize) -> InputSize:
    """Return an input size, for which a number stands for square RGB images."""
    return (3, size, size) if isinstance(size, int) else size


def as_image_size(height: int, width: int) -> int | list[int]:
    """Return the value of `data.image_size`, which is a number for square images."""
    return height if height == width else [height, width]


def written_size(height: int, width: int) -> str:
    """Write the value of `data.image_size` as on the command line."""
    return f"{as_image_size(height, width)}".replace(" ", "")


def one_channel(numbers: Sequence[float]) -> float:
    """Return the mean or std of grey images for those of red, green and blue: their mean, as in timm's practice."""
    return round(sum(numbers) / len(numbers), 4)


def in_pixels(size: Sequence[int]) -> str:
    """Describe an input size or a height and width, as in "224 pixels" or "160 x 224 pixels"."""
    height, width = size[-2:]
    return f"{height} pixels" if height == width else f"{height} x {width} pixels"


def resolved_interpolation(data: DataConfig) -> str:
    return data.interpolation or "bilinear"


def expected_num_classes(config: TrainConfig) -> int | None:
    """Return the number of classes, or None if neither the config nor the data set's name determines it."""
    return config.model.num_classes or DATA_SETS[config.data.name].num_classes


def has_top5(num_classes: int) -> bool:
    """Whether top5 is worth showing: with five or fewer classes, it is 100 % whatever the model."""
    return num_classes > 5


def micro_batch_size(trainer: TrainerConfig, world_size: int) -> int:
    """Return the number of images per micro-batch; an unresolved `auto` is treated like null."""
    if isinstance(trainer.micro_batch_size, int):
        return trainer.micro_batch_size
    return trainer.global_batch_size // (world_size * trainer.grad_accum_steps)


def accumulation(trainer: TrainerConfig, world_size: int) -> int:
    """Return the number of micro-batches per step in each process."""
    return trainer.global_batch_size // (world_size * micro_batch_size(trainer, world_size))


def total_steps(config: TrainConfig, steps_per_epoch: int, step_flops: int | None = None) -> int:
    """Return the number of steps of a run; `step_flops` (see models/counting.py) is needed for trainer.max_pflops."""
    trainer = config.trainer
    ends = [trainer.epochs * steps_per_epoch, trainer.max_steps, bought_steps(trainer, step_flops)]
    return min(end for end in ends if end is not None)


def bought_steps(trainer: TrainerConfig, step_flops: int | None) -> int | None:
    """Return the number of whole steps that trainer.max_pflops buys, or None if it is not set.

    Raises:
        ConfigError: it is less than one step.
    """
    if trainer.max_pflops is None:
        return None
    if not step_flops:
        raise ValueError("trainer.max_pflops is set, but the FLOPs of a step are not given")
    # Rounding to whole FLOPs first lets a budget that was written for a number of steps buy that number.
    steps = round(trainer.max_pflops * 1e15) // step_flops
    least = f"must buy a step of {trainer.global_batch_size} images, so at least {step_flops / 1e15 * 1.0001:.4g}"
    require(steps > 0, "trainer.max_pflops", f"{trainer.max_pflops:g}", least)
    return steps


def with_micro_batch_size(trainer: TrainerConfig, micro_batch_size: int) -> TrainerConfig:
    """Set the micro-batch size and the number of accumulation steps that it implies for one process."""
    # The result is for one process even if several are running, so that a config's meaning does not depend on the
    # number of processes.
    steps = trainer.global_batch_size // micro_batch_size
    return dataclasses.replace(trainer, micro_batch_size=micro_batch_size, grad_accum_steps=steps)
