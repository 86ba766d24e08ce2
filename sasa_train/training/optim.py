"""Build the optimizer and schedule with timm's factories. The learning rate depends only on the step."""

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from sasa_train.config.derived import input_size, total_steps
from sasa_train.config.keys import OptimizerConfig, ScheduleConfig, TrainConfig
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, shorten
from sasa_train.training.freezing import set_to_train

# Arguments of timm's factory that split the parameters into groups.
GROUP_ARGUMENTS = {"layer_decay_min_scale", "layer_decay_no_opt_scale", "fallback_list", "fallback_no_weight_decay"}
# Arguments of create_scheduler_v2 that have their own config keys, use other units or need a metric.
SET_BY_US = {
    "optimizer", "sched", "num_epochs", "updates_per_epoch", "step_on_epochs", "warmup_epochs", "warmup_prefix",
    "warmup_lr", "min_lr", "decay_epochs", "decay_milestones", "decay_rate", "cooldown_epochs", "patience_epochs",
    "plateau_mode",
}  # fmt: skip


def peak_lr(config: TrainConfig) -> float:
    """Return the learning rate after warm-up: `optimizer.lr`, times global batch size / 256 if lr_basis is per_256."""
    scale = config.trainer.global_batch_size / 256 if config.optimizer.lr_basis == "per_256" else 1.0
    return config.optimizer.lr * scale


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build timm's optimizer, without weight decay for norms, biases and parameters in `model.no_weight_decay()`.

    Raises:
        ConfigError: timm does not know the name, an argument is not accepted, or a trial step fails.
    """
    optimizer = config.optimizer
    base = optimizer.name.removeprefix("lookahead_")
    names = [str(name) for name in list_optimizers()]
    if base not in names:
        close = get_close_matches(base, names, n=1)
        hint = f"did you mean {close[0]}? It" if close else "it"
        raise ConfigError(
            f"optimizer.name={optimizer.name}: {hint} must be one of {', '.join(names)}; or lookahead_ and one"
        )
    try:
        arguments = _arguments(optimizer, base)
        is_on_cuda = any(parameter.is_cuda for parameter in model.parameters())
        if is_on_cuda and "fused" in _parameters_of(base) and not {"fused", "foreach"} & arguments.keys():
            arguments["fused"] = True  # one kernel; the device can skip the update (see nonfinite.py)
        built = create_optimizer_v2(
            model,
            opt=optimizer.name,
            lr=peak_lr(config),
            weight_decay=optimizer.weight_decay,
            layer_decay=optimizer.layer_decay,
            **arguments,
        )
    except (*LIBRARY_ERRORS, ImportError) as error:
        raise ConfigError(f"{_described(optimizer)} cannot be built: {error}") from error
    if needs_graph(built):
        _check_second_order(config, model)
        _complete_second_order(built, optimizer.name)
    return built


def needs_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer differentiates the gradients, as adahessian does."""
    return getattr(optimizer, "is_second_order", False)


def backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Add the loss's gradients to the parameters'; keep their graph if the optimizer differentiates them."""
    with warnings.catch_warnings():
        # The reference cycle that torch warns of ends with the step; see `_free_graph`.
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True", UserWarning)
        loss.backward(create_graph=needs_graph(optimizer))


def _check_second_order(config: TrainConfig, model: nn.Module) -> None:
    """Raise ConfigError if the run has no second derivatives."""
    trainer, where = config.trainer, f"optimizer.name={config.optimizer.name} needs second derivatives"
    for module in model.modules():
        # timm's attention sets `fused_attn` where it calls torch's kernels, which are differentiable once.
        if getattr(module, "fused_attn", False):
            raise ConfigError(
                f"{where}, which {type(module).__name__} of model.name={config.model.name} does not have; "
                "use optimizer.name=adamw, or a convolutional model such as model.name=conv_resnet26"
            )
    obstacles = {
        "trainer.compile=true does not have; use trainer.compile=false": trainer.compile,
        "trainer.grad_checkpointing=true does not have; use false": trainer.grad_checkpointing,
        "trainer.precision=fp16 scales; use bf16 or fp32": trainer.precision == "fp16",
        f"{world_size()} processes do not average; use one": world_size() > 1,
        "a resumed run lacks between updates; use optimizer.args.update_each=1": (
            config.optimizer.args.get("update_each", 1) != 1
        ),
    }
    for obstacle, is_present in obstacles.items():
        if is_present:
            raise ConfigError(f"{where}, which {obstacle}")


def _complete_second_order(built: Any, name: str) -> None:
    """Make timm's adahessian resume exactly, free each step's graph, and name what has no second derivative."""
    adahessian = getattr(built, "_base_optimizer", built)  # timm's lookahead wraps it
    adahessian.register_step_pre_hook(_seed_vectors)
    adahessian.register_step_post_hook(_free_graph)
    set_hessian = adahessian.set_hessian

    def explained() -> None:
        try:
            set_hessian()
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise ConfigError(f"optimizer.name={name} cannot train this model: {error}; use adamw") from error

    adahessian.set_hessian = explained


def _seed_vectors(optimizer: Any, *_) -> None:
    """Seed adahessian's random vectors from torch's generator, because checkpoints contain its state only."""
    device = next(optimizer.get_params()).device
    optimizer.generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))


def _free_graph(optimizer: Any, *_) -> None:
    for parameter in optimizer.get_params():
        if parameter.grad is not None:
            parameter.grad.detach_()


def try_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Run one step with a tiny model; raise ConfigError if it fails."""
    # Many optimizers reject unsuitable arguments only in their first step.
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)).to(device)
    # timm would warn that the layers of this model are not ordered.
    in_one = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, layer_decay=None))
    optimizer = build_optimizer(in_one, tiny)
    for parameter in tiny.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    try:
        if needs_graph(optimizer):
            backward(tiny(torch.ones(2, 3, 6, 6, device=device)).square().sum(), optimizer)
        optimizer.step()
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{_described(config.optimizer)} cannot take a step: {error}") from error


def try_loaded(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Run one step on copies of a model and its optimizer, whose state comes from a file; raise any error of it."""
    # Optimizers load tensors of any shape, and fail in their next step.
    _trial_step(config, copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()))


def check_saved(config: TrainConfig, model: nn.Module, saved: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint's optimizer lacks a tensor that a step leaves, or has one of another kind.

    Also raise it if the optimizer's own count of its steps is not one that the run's steps allow.
    """
    # A step would start a missing tensor anew, and a tensor of whole numbers, which lacks the fractions, can be loaded.
    state, model = saved["optimizer"]["state"], copy.deepcopy(model)
    fresh = _trial_step(config, model)
    expected = fresh.state_dict()["state"]
    is_changed = any(key.startswith("optimizer.") for key in config.allow_config_change)
    # GradScaler may have skipped every step so far; another optimizer's arguments may need state for the first time.
    if not state and (is_changed or saved["scaler"] or saved["step"] == 0):
        return
    missing = [number for number in expected if not state.get(number)]
    # A parameter that no loss depends on has no state.
    used = _with_gradient(config, model) if missing else set()
    parameters = [parameter for group in fresh.param_groups for parameter in group["params"]]
    if unfounded := [number for number in missing if parameters[number] in used]:
        raise ValueError(f"optimizer.state has no entry {unfounded[0]}, and must have one per trained parameter")
    for number in expected.keys() - set(missing):
        for name, value in expected[number].items():
            where = f"optimizer.state[{number}].{name}"
            if name in state[number]:
                found = state[number][name]
                if _kinds(found) != _kinds(value):
                    raise ValueError(f"{where} has {_kinds(found)}, and must have {_kinds(value)}")
                # The next step would spoil the weights or, divided by an infinite second moment, change nothing.
                if isinstance(found, Tensor) and not found.isfinite().all():
                    raise ValueError(f"{where} is infinite or not a number in places")
                if isinstance(found, Tensor) and "sq" in name and (found < 0).any():
                    raise ValueError(f"{where} is negative in places, which no square is")
            elif not is_changed:
                raise ValueError(f"{where} is missing")
    # Groups have a count in lamb and lookahead.
    entries = [*(state[number] for number in expected.keys() - set(missing)), *saved["optimizer"]["param_groups"]]
    for count in (float(entry[name]) for entry in entries for name in ("step", "lookahead_step") if name in entry):
        # A parameter that was frozen for a while, or whose steps GradScaler skipped, has fewer.
        if not (1 <= count <= saved["step"] and count.is_integer()):
            raise ValueError(f"optimizer's step={count:g} must be a whole number from 1 to step={saved['step']:,}")


def _trial_step(config: TrainConfig, model: nn.Module, state: dict[str, Any] | None = None) -> torch.optim.Optimizer:
    """Take a step with the model, which it changes, and a new optimizer that loads `state`; return the optimizer."""
    trial = build_optimizer(config, model)
    if state is not None:
        trial.load_state_dict(state)
    if needs_graph(trial):
        backward(torch.stack([(parameter + 1).square().sum() for parameter in model.parameters()]).sum(), trial)
    else:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trial.step()
    return trial


def _with_gradient(config: TrainConfig, model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that get a gradient from two images."""
    model.zero_grad()
    parameters = list(model.parameters())
    with torch.random.fork_rng([parameters[0].device] if parameters[0].is_cuda else []):
        set_to_train(model)(torch.zeros(2, *input_size(config.data), device=parameters[0].device)).sum().backward()
    return {parameter for parameter in parameters if parameter.grad is not None}


def _kinds(value: Any) -> Any:
    """Return the kind of numbers and the shape of a tensor, or of each tensor in a list; None for anything else."""
    if isinstance(value, list | tuple):
        return [_kinds(each) for each in value]
    if not isinstance(value, Tensor):
        return None
    return f"{'real' if value.is_floating_point() else 'whole'} numbers {list(value.shape)}"


def _described(group: OptimizerConfig | ScheduleConfig) -> str:
    """Format a config group: its name, and all keys whose values differ from their defaults."""
    prefix, usual = ("optimizer" if isinstance(group, OptimizerConfig) else "schedule"), type(group)()
    shown = {key: value for key, value in vars(group).items() if key == "name" or value != getattr(usual, key)}
    return " ".join(f"{prefix}.{key}={shorten(value)}" for key, value in shown.items())


def _arguments(config: OptimizerConfig, base: str) -> dict[str, Any]:
    """Return the arguments that are set, after checking them against the optimizer's signature."""
    given = {"momentum": config.momentum, "betas": config.betas, "eps": config.eps}
    given = {name: value for name, value in given.items() if value is not None}
    if twice := given.keys() & config.args.keys():
        raise ConfigError(f"optimizer.args={config.args}: {', '.join(twice)} is also set as a key of its own")
    parameters = _parameters_of(base)
    accepted = parameters.keys() - {"params", "lr", "weight_decay"} | GROUP_ARGUMENTS
    for name, value in (given | config.args).items():
        if name not in accepted:
            where = f"optimizer.{name}={value}" if name in given else f"optimizer.args={config.args}"
            raise ConfigError(f"{where}: {config.name} takes no {name}; it takes {', '.join(sorted(accepted))}")
        key = f"optimizer.{name}" if name in given else f"optimizer.args.{name}"
        _check_kind(f"{key}={value}", value, parameters[name])
    return {k: tuple(v) if isinstance(v, list) else v for k, v in (given | config.args).items()}


def _parameters_of(base: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(get_optimizer_class(base, bind_defaults=False)).parameters


def _check_kind(where: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise ConfigError if a value's type does not match the argument's default or annotation."""
    # timm and torch often accept such values silently.
    default, hint = parameter.default, parameter.annotation
    if value is None:
        return
    if isinstance(default, bool) or hint == bool | None:
        fits, rule = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float) or hint == float | None:
        fits, rule = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif isinstance(default, tuple | list):
        fits, rule = isinstance(value, list) and len(value) == len(default), f"a list of {len(default)}"
    else:
        return
    if not fits:
        raise ConfigError(f"{where} must be {rule}")


def check_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> None:
    """Raise ConfigError if the schedule is unknown or its learning rate is invalid at one of 17 steps of the run."""
    scheduler = build_schedule(config, optimizer, steps_per_epoch)
    last = total_steps(config, steps_per_epoch) - 1
    for step in sorted({last * part // 16 for part in range(17)}):
        try:
            scheduler.step_update(step)
            rates = [float(group["lr"]) for group in optimizer.param_groups]
        except LIBRARY_ERRORS as error:
            raise ConfigError(f"{_described(config.schedule)} has no learning rate at step {step}: {error}") from error
        if not all(0 <= rate <= 1e38 for rate in rates):
            raise ConfigError(f"{_described(config.schedule)}: the learning rate of step {step} is {max(rates)}")


def build_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, step_flops: int | None = None
) -> Scheduler:
    """Build timm's schedule for all steps of the run; `step_update(step)` must be called before each step.

    step_flops: see `total_steps`.

    Raises:
        ConfigError: timm does not know the name or an argument, or the schedule depends on more than the step.
    """
    schedule, steps = config.schedule, total_steps(config, steps_per_epoch, step_flops)
    if schedule.name in ("plateau", "none"):
        raise ConfigError(
            f"schedule.name={schedule.name}: the learning rate must be a function of the step; use constant or another"
        )
    parameters = inspect.signature(create_scheduler_v2).parameters
    accepted = parameters.keys() - SET_BY_US
    if unknown := schedule.args.keys() - accepted:
        what = f"timm's schedules take no {', '.join(unknown)}; they take {', '.join(sorted(accepted))}"
        raise ConfigError(f"schedule.args={schedule.args}: {what}")
    for name, value in schedule.args.items():
        _check_kind(f"schedule.args.{name}={value}", value, parameters[name])
    warmup_steps = min(round(schedule.warmup_epochs * steps_per_epoch), steps - 1)
    arguments = dict(schedule.args)
    try:
        if "stable_timescale" in arguments:  # for rsqrt, in epochs like all other keys
            arguments["stable_timescale"] *= steps_per_epoch
        # All values are in steps, so timm's "epoch" is one update.
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=_cycle_steps(schedule, steps - warmup_steps),
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=warmup_steps,
            warmup_prefix=True,  # the decay begins when warm-up ends, so that the peak is reached
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            decay_epochs=_decay_steps(schedule, steps_per_epoch),
            # 1 is added because timm uses the decay of the next update.
            decay_milestones=[round(n * steps_per_epoch) - warmup_steps + 1 for n in schedule.decay_milestones],
            decay_rate=schedule.decay_rate,
            **arguments,
        )
    except (*LIBRARY_ERRORS, UnboundLocalError) as error:
        raise ConfigError(f"{_described(schedule)}: {error}") from error
    return scheduler


def _cycle_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Return the number of steps in the first cycle, chosen so that the last cycle ends with the run."""
    growth, num_cycles = schedule.args.get("cycle_mul", 1.0), schedule.args.get("cycle_limit", 1)
    if not isinstance(num_cycles, int) or num_cycles < 1:
        raise ValueError(f"cycle_limit={num_cycles} must be a whole number, at least 1")
    # The total length of all cycles, relative to the first, is a geometric series.
    first_cycles = num_cycles if growth == 1 else (growth**num_cycles - 1) / (growth - 1)
    return max(1, round(steps / first_cycles))


def _decay_steps(schedule: ScheduleConfig, steps_per_epoch: int) -> float:
    if schedule.decay_epochs is None and schedule.name in ("wsd", "rsqrt"):
        return 0.2  # timm's default, a fraction of the run
    return max(1, round((schedule.decay_epochs or 30) * steps_per_epoch))
