"""trainer.micro_batch_size=auto: the largest micro-batch that fits into memory, the global batch unchanged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sasa_train.compose import load_config
from sasa_train.config import ConfigError, TrainConfig, TrainerConfig, resolved_image_size
from sasa_train.data.datasets import load_image_sets
from sasa_train.engine import autocast, build_state
from sasa_train.memory import available_memory
from sasa_train.models import build_model
from sasa_train.models.counting import count_layers
from sasa_train.optim import build_optimizer

SHARE = 0.5  # of the CPU's free memory that activations may take: gradients and temporaries need the rest
CUDA_SHARE = 0.9  # of the device's memory, after a step that fitted: fragmentation grows


def with_micro_batch_size(trainer: TrainerConfig, micro_batch_size: int) -> TrainerConfig:
    """Both keys set: the micro-batch, and the accumulation that follows from it."""
    steps = trainer.global_batch_size // micro_batch_size
    return dataclasses.replace(trainer, micro_batch_size=micro_batch_size, grad_accum_steps=steps)


def settle_auto(config: TrainConfig, checkpoint: dict[str, Any] | None, device: torch.device) -> TrainConfig:
    """Replace `auto` by what the checkpoint was trained with, or by what fits now.

    Raises:
        ConfigError: not even one image fits.
    """
    trainer = config.trainer
    if trainer.micro_batch_size != "auto":
        return config
    if checkpoint is not None:
        saved = load_config(checkpoint["config"]).trainer
        found = saved.global_batch_size // saved.grad_accum_steps
    else:
        found = largest_micro_batch(config, device)
        print(f"trainer.micro_batch_size=auto: {found} images fit")
    return dataclasses.replace(config, trainer=with_micro_batch_size(trainer, found))


def largest_micro_batch(config: TrainConfig, device: torch.device) -> int:
    """The largest divisor of the global batch that fits: tried on CUDA, counted on the CPU, which would swap."""
    batch = config.trainer.global_batch_size
    divisors = [n for n in range(batch, 0, -1) if batch % n == 0]
    fits = _fits_cuda(config, device) if device.type == "cuda" else _fits_cpu(config)
    for size in divisors:
        if fits(size):
            return size
    raise ConfigError(
        f"trainer.micro_batch_size=auto: not even one image of {resolved_image_size(config.data)} pixels fits into the "
        f"memory of {device}; use trainer.grad_checkpointing=true, a smaller model or data.image_size"
    )


def _fits_cpu(config: TrainConfig) -> Callable[[int], bool]:
    size = resolved_image_size(config.data)
    with torch.device("meta"):
        total = count_layers(build_model(config.model, config.model.num_classes or 1000, size), size)[-1]
    weights = 4 * 4 * total.params  # with gradient, momentum and average
    room = SHARE * (available_memory(torch.device("cpu")) - weights)
    return lambda num_images: num_images * total.activation_bytes <= room


def _fits_cuda(config: TrainConfig, device: torch.device) -> Callable[[int], bool]:
    size, num_classes = resolved_image_size(config.data), len(load_image_sets(config.data)[0].classes)

    def fits(num_images: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            state = build_state(
                config.trainer,
                build_model(config.model, num_classes, size),
                lambda model: build_optimizer(config, model),
                device,
            )
            images = torch.zeros(num_images, 3, size, size, device=device)
            labels = torch.zeros(num_images, dtype=torch.int64, device=device)
            with autocast(device, config.trainer.precision):
                loss = nn.functional.cross_entropy(state.model.train()(images).float(), labels)
            loss.backward()
            state.optimizer.step()
        except torch.cuda.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_reserved(device) <= CUDA_SHARE * torch.cuda.mem_get_info(device)[1]

    return fits
