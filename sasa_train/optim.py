"""Optimizer and schedule from timm's factories; the learning rate is a pure function of the step."""

import inspect
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from sasa_train.config import ConfigError, OptimizerConfig, ScheduleConfig, TrainConfig, total_steps

# Arguments of timm's factory that split the parameters into groups.
GROUP_ARGUMENTS = {"layer_decay_min_scale", "layer_decay_no_opt_scale", "fallback_list", "fallback_no_weight_decay"}
# Arguments of create_scheduler_v2 that have keys of their own, count in other units, or need a metric.
SET_BY_US = {
    "optimizer", "sched", "num_epochs", "updates_per_epoch", "step_on_epochs", "warmup_epochs", "warmup_prefix",
    "warmup_lr", "min_lr", "decay_epochs", "decay_milestones", "decay_rate", "cooldown_epochs", "patience_epochs",
    "plateau_mode",
}  # fmt: skip


def peak_lr(config: TrainConfig) -> float:
    """The learning rate after warm-up: `optimizer.lr` itself, or for each 256 images of the global batch."""
    scale = config.trainer.global_batch_size / 256 if config.optimizer.lr_basis == "per_256" else 1.0
    return config.optimizer.lr * scale


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; no weight decay on norms, biases and what `model.no_weight_decay()` names.

    Raises:
        ConfigError: a name that timm has not, an argument that the optimizer does not take, or one that cannot work.
    """
    optimizer = config.optimizer
    base = optimizer.name.removeprefix("lookahead_")
    names = [str(name) for name in list_optimizers()]
    if base not in names:
        raise ConfigError(f"optimizer.name={optimizer.name} must be one of {', '.join(names)}, or lookahead_ and one")
    try:
        arguments = _arguments(optimizer, base)
        built = create_optimizer_v2(
            model,
            opt=optimizer.name,
            lr=peak_lr(config),
            weight_decay=optimizer.weight_decay,
            layer_decay=optimizer.layer_decay,
            **arguments,
        )
    except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.name={optimizer.name} cannot be built: {error}") from error
    if getattr(built, "is_second_order", False):
        raise ConfigError(f"optimizer.name={optimizer.name} needs second derivatives, which local attention has not")
    return built


def _arguments(config: OptimizerConfig, base: str) -> dict[str, Any]:
    """What is set, checked against the optimizer's signature."""
    given = {"momentum": config.momentum, "betas": config.betas, "eps": config.eps}
    given = {name: value for name, value in given.items() if value is not None}
    if twice := given.keys() & config.args.keys():
        raise ConfigError(f"optimizer.args={config.args}: {', '.join(twice)} is also set as a key of its own")
    signature = inspect.signature(get_optimizer_class(base, bind_defaults=False))
    accepted = signature.parameters.keys() - {"params", "lr", "weight_decay"} | GROUP_ARGUMENTS
    for name, value in (given | config.args).items():
        if name not in accepted:
            where = f"optimizer.{name}={value}" if name in given else f"optimizer.args={config.args}"
            raise ConfigError(f"{where}: {config.name} takes no {name}; it takes {', '.join(sorted(accepted))}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in (given | config.args).items()}


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule over all steps of the run; call `step_update(step)` before each step.

    Raises:
        ConfigError: a name or an argument that timm has not, or a schedule that is no function of the step.
    """
    schedule, steps = config.schedule, total_steps(config, steps_per_epoch)
    if schedule.name in ("plateau", "none"):
        raise ConfigError(
            f"schedule.name={schedule.name}: the learning rate must be a function of the step; use constant or another"
        )
    accepted = inspect.signature(create_scheduler_v2).parameters.keys() - SET_BY_US
    if unknown := schedule.args.keys() - accepted:
        raise ConfigError(
            f"schedule.args={schedule.args}: timm's schedules take no {', '.join(unknown)}; they take "
            + ", ".join(sorted(accepted))
        )
    warmup_steps = min(round(schedule.warmup_epochs * steps_per_epoch), steps - 1)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=_cycle_steps(schedule, steps - warmup_steps),  # all in steps: an "epoch" of one update
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=warmup_steps,
            warmup_prefix=True,  # the decay begins where warm-up ends, so that the peak is reached
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            decay_epochs=_decay_steps(schedule, steps_per_epoch),
            decay_milestones=[
                round(epoch * steps_per_epoch) - warmup_steps + 1  # timm takes the decay of the update after this one
                for epoch in schedule.decay_milestones
            ],
            decay_rate=schedule.decay_rate,
            **schedule.args | _timescale(schedule, steps_per_epoch),
        )
    except (AssertionError, TypeError, ValueError, UnboundLocalError, ZeroDivisionError) as error:
        raise ConfigError(f"schedule.name={schedule.name} with {schedule.args}: {error}") from error
    return scheduler


def _timescale(schedule: ScheduleConfig, steps_per_epoch: int) -> dict[str, float]:
    """rsqrt's `stable_timescale`, which is in epochs as everything else, in steps."""
    if "stable_timescale" not in schedule.args:
        return {}
    return {"stable_timescale": schedule.args["stable_timescale"] * steps_per_epoch}


def _cycle_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Steps of the first cycle, so that all cycles together end with the run."""
    growth, num_cycles = schedule.args.get("cycle_mul", 1.0), schedule.args.get("cycle_limit", 1)
    return max(1, round(steps / sum(growth**i for i in range(num_cycles))))


def _decay_steps(schedule: ScheduleConfig, steps_per_epoch: int) -> float:
    if schedule.decay_epochs is None and schedule.name in ("wsd", "rsqrt"):
        return 0.2  # timm's own default, a part of the whole
    return round((schedule.decay_epochs or 30) * steps_per_epoch)
