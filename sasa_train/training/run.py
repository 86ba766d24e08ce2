"""A whole run, from a config to a finished run folder; the order of events is the order of `train`."""

import contextlib
import dataclasses
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from sasa_train.config.derived import resolved_image_size
from sasa_train.config.identity import default_run_name
from sasa_train.config.keys import TrainConfig
from sasa_train.config.saved import to_yaml
from sasa_train.data.fingerprint import differences
from sasa_train.data.loader import Loaders, build_loaders, fetch_once
from sasa_train.data.workers import DataWorkerError
from sasa_train.device import resolve
from sasa_train.files import write_atomic
from sasa_train.machine import available_memory, is_out_of_memory, keep_freed_memory
from sasa_train.models import build_model, check_model, enable_grad_checkpointing
from sasa_train.processes import collectives
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import CheckpointError, Checkpoints
from sasa_train.runs.folder import RunFolder, check_data, is_finished, open_run
from sasa_train.runs.provenance import describe_changes, provenance
from sasa_train.runs.weights import Weights, load_into, read_weights
from sasa_train.signals import Interrupted, StopRequest
from sasa_train.terminal import printable, say, warn
from sasa_train.training.announce import describe_end, describe_finished, describe_plan
from sasa_train.training.loop import Loop
from sasa_train.training.memory import OutOfMemoryError, check_memory, memory_advice, settle_auto
from sasa_train.training.optim import build_optimizer, build_schedule, check_schedule, try_optimizer
from sasa_train.training.state import TrainState, build_state
from sasa_train.training.step import Stepper


def train(config: TrainConfig, stop: StopRequest) -> bool:
    """Train one config; True when it is finished (or was before), False when a signal stopped it at a safe place.

    Raises:
        ConfigError: a refused config or input, before training starts.
        CheckpointError: no good checkpoint to continue from, or one that cannot be written.
        NonFiniteError: naming the step, the module and the images; such weights are never saved.
        OutOfMemoryError: with what to set so that it fits.
    """
    run_name = config.run_name or default_run_name(config)
    device, config = collectives.everywhere(lambda: resolve_buildable(config), ConfigError)
    run = open_together(config, run_name)
    with run.lock or contextlib.nullcontext():
        config = collectives.from_first(lambda: settle_auto(config, run, device), ConfigError)
        if run.is_new:
            run.write_config(config)  # with what auto was settled to, before anything can stop the run
        elif run.checkpoint is not None and is_finished(run.checkpoint, config):
            run.write_end(run.checkpoint)  # a kill may have come between its last checkpoint and this
            say(describe_finished(run.path, run.checkpoint))
            return True
        return train_in_folder(config, device, run, stop)


def train_in_folder(config: TrainConfig, device: torch.device, run: RunFolder, stop: StopRequest) -> bool:
    """`train`, once the folder is ours and what it continues from is known."""
    if warning := collectives.restart_warning():
        warn(warning)
    say(f"{to_yaml(config)}\nrun folder  {run.path}")
    stop.set_max_hours(config.trainer.max_hours)
    if device.type == "cpu":
        keep_freed_memory()
    weights = None
    if run.checkpoint is None and config.model.pretrained is not None:  # else the checkpoint has what they became
        weights = collectives.from_first(lambda: read_weights(config), ConfigError)
    collectives.everywhere(lambda: fetch_once(config), ConfigError)
    memory = min(collectives.gather(available_memory(device)))
    loaders = collectives.everywhere(lambda: build_loaders(config, device, memory), ConfigError, DataWorkerError)
    check_same_images(config, loaders)
    run.provenance, difference = provenance(config)
    if run.checkpoint is not None:
        checkpoint = run.checkpoint
        collectives.everywhere(lambda: check_data(checkpoint, loaders.fingerprint, config), ConfigError)
        for change in describe_changes(run.checkpoint["provenance"], run.provenance):
            warn(f"changed since the checkpoint was written: {change}")
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(loaders.classes), resolved_image_size(config.data))
    begin_with(weights, model, loaders.classes, run, config)
    del weights  # another model's worth of memory
    if config.trainer.grad_checkpointing:
        enable_grad_checkpointing(model)
    if config.trainer.sync_batch_norm and world_size() > 1:
        model = convert_sync_batchnorm(model)
    state = build_state(config.trainer, model, lambda m: build_optimizer(config, m), device)
    state.hyperparameters += tuple(config.optimizer.args)
    steps_per_epoch = loaders.train.plan.steps_per_epoch
    stepper = Stepper(config.trainer, state, build_schedule(config, state.optimizer, steps_per_epoch), config.seed)
    collectives.everywhere(lambda: continue_from(run, state, config), ConfigError)
    loop = Loop(config, run, loaders, stepper, stop)
    say(describe_plan(config, loaders, state, loop.num_steps))
    run.write_start(difference, state.step)

    try:
        with logging_redirect_tqdm():  # log lines go above the progress bar
            finished = loop.run()
    except BaseException as error:
        run.try_write_info(status="interrupted" if isinstance(error, Interrupted) else "failed")
        if is_out_of_memory(error):
            raise OutOfMemoryError(memory_advice(config, device, run.path, error)) from error
        raise
    finally:
        loop.logger.close()
        loaders.close()
        num_unreadable = note_unreadable(run.path / "unreadable.txt", loaders) if run.lock else 0
    if finished:
        run.write_info(status="finished", best=state.best, seconds=round(state.seconds, 1))
        say(describe_end(config, run.path, state, loop.last_val, num_unreadable))
    else:
        run.write_info(status="interrupted")
        how = "sasa-train" if config.resume == "never" else "the same command again, or sasa-train"
        say(f"{stop.reason}: saved at step {state.step}; to continue: {how} resume={run.path}")
    collectives.wait_for_all()  # torchrun ends all when one has ended with 75
    return finished


def begin_with(
    weights: Weights | None, model: nn.Module, classes: list[str], run: RunFolder, config: TrainConfig
) -> None:
    """Load the weights of `model.pretrained`, say what fitted, and note their SHA-256; a resumed run keeps its note."""
    if weights is not None:
        source = printable(str(config.model.pretrained))
        loaded = collectives.everywhere(lambda: load_into(model, weights, classes, source), ConfigError)
        report = loaded.describe()
        say(f"pretrained  {source}\n{textwrap.indent(report, ' ' * 12)}")
        run.provenance |= {"pretrained_sha256": weights.sha256, "pretrained_report": report}
    elif run.checkpoint is not None and config.model.pretrained is not None:
        before = run.checkpoint["provenance"]
        run.provenance |= {key: before.get(key) for key in ("pretrained_sha256", "pretrained_report")}


def open_together(config: TrainConfig, run_name: str) -> RunFolder:
    """`open_run` by the first process, which sends the others the checkpoint: they need not see its disk."""
    opened: list[RunFolder] = []

    def opening() -> tuple[Path, dict[str, Any] | None, bool]:
        run = open_run(config, run_name)
        opened.append(run)
        return run.path, run.checkpoint, run.is_new

    path, checkpoint, is_new = collectives.from_first(opening, ConfigError, CheckpointError)
    return opened[0] if opened else RunFolder(path, None, Checkpoints(path, 0), checkpoint, is_new)


def check_same_images(config: TrainConfig, loaders: Loaders) -> None:
    """Refuse machines whose images are not those of the first process."""
    first = collectives.from_first(lambda: loaders.fingerprint)

    def check() -> None:
        found = [line for split in first for line in differences(first[split], loaders.fingerprint[split], split)]
        if found:
            changes = "\n".join(f"  {line}" for line in found)
            raise ConfigError(
                f"data.root={config.data.root}: the images on {platform.node()} are not the first process's:\n"
                f"{changes}\ngive every machine the same ones"
            )

    collectives.everywhere(check, ConfigError)


def note_unreadable(path: Path, loaders: Loaders) -> int:
    """Add what could not be read to the run's list; returns how many lines that has now."""
    before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = dict.fromkeys([*before, *loaders.unreadable()])
    if len(lines) > len(before):
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def continue_from(run: RunFolder, state: TrainState, config: TrainConfig) -> None:
    """Load the checkpoint that the run continues from, if there is one, and let go of all but its metrics."""
    if run.checkpoint is None:
        return
    try:
        state.load_state_dict(run.checkpoint)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the checkpoint does not fit this model or optimizer ({error}); "
            f"allow_config_change={config.allow_config_change} asks too much of it"
        ) from error
    run.metrics, run.checkpoint = run.checkpoint["metrics"], None
    run.write_config(config)


def resolve_buildable(config: TrainConfig) -> tuple[torch.device, TrainConfig]:
    device, config = resolve(config)
    check_buildable(config, device)
    return device, config


def check_buildable(config: TrainConfig, device: torch.device) -> None:
    """Build model, optimizer and schedule without weights, so that they are refused before any data is loaded."""
    model = check_model(config.model, resolved_image_size(config.data))
    check_memory(config, model, device)
    if config.trainer.grad_checkpointing:
        enable_grad_checkpointing(model)
    whole = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=None))
    check_schedule(whole, build_optimizer(config, model), steps_per_epoch=1000)  # as if: the data set is not known yet
    try_optimizer(config, device)
