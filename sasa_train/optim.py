"""Optimizer and schedule from timm's factories; the learning rate is a pure function of the step."""

import inspect

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from sasa_train.config import ConfigError, OptimizerConfig, TrainConfig


def peak_lr(config: TrainConfig) -> float:
    """The learning rate after warm-up: `optimizer.lr` itself, or for each 256 images of the global batch."""
    scale = config.trainer.global_batch_size / 256 if config.optimizer.lr_basis == "per_256" else 1.0
    return config.optimizer.lr * scale


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; no weight decay on norms, biases and what `model.no_weight_decay()` names.

    Raises:
        ConfigError: a name that timm has not, or an argument that the optimizer does not take.
    """
    optimizer = config.optimizer
    names = [str(name) for name in list_optimizers()]
    if optimizer.name not in names:
        raise ConfigError(f"optimizer.name={optimizer.name} must be one of {', '.join(names)}")
    return create_optimizer_v2(
        model, opt=optimizer.name, lr=peak_lr(config), weight_decay=optimizer.weight_decay, **_arguments(optimizer)
    )


def _arguments(config: OptimizerConfig) -> dict:
    given = {"momentum": config.momentum, "betas": config.betas and tuple(config.betas), "eps": config.eps}
    accepted = inspect.signature(get_optimizer_class(config.name, bind_defaults=False)).parameters
    arguments = {name: value for name, value in given.items() if value is not None}
    for name, value in arguments.items():
        if name not in accepted:
            raise ConfigError(f"optimizer.{name}={value}: {config.name} takes no {name}; leave it null")
    return arguments


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule over all steps of the run; call `step_update(step)` before each step.

    Raises:
        ConfigError: a name that timm has not.
    """
    schedule, steps = config.schedule, total_steps(config, steps_per_epoch)
    warmup_steps = min(round(schedule.warmup_epochs * steps_per_epoch), steps - 1)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=steps - warmup_steps,  # counted in steps throughout: an "epoch" of one update
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=warmup_steps,
            warmup_prefix=True,  # the decay begins where warm-up ends, so that the peak is reached
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            decay_epochs=round(schedule.decay_epochs * steps_per_epoch),
            decay_rate=schedule.decay_rate,
        )
    except (AssertionError, ValueError, UnboundLocalError) as error:
        raise ConfigError(f"schedule.name={schedule.name}: {error}") from error
    if scheduler is None:
        raise ConfigError(f"schedule.name={schedule.name} is not one that timm has; try cosine, step or constant")
    return scheduler


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    planned = config.trainer.epochs * steps_per_epoch
    return min(planned, config.trainer.max_steps or planned)
