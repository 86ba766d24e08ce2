"""A complete run, from a config to a finished run folder; `train` and `train_in_folder` show the order of execution.

With several processes, all run this code in lockstep. Each call to `collectives`, here or in a function named
`..._together`, is an exchange in which all processes must take part.
"""

import contextlib
import dataclasses
import importlib.util
import platform
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from sasa_train.config import own_code
from sasa_train.config.derived import expected_num_classes
from sasa_train.config.keys import TrainConfig, with_values
from sasa_train.config.saved import as_begun, to_yaml
from sasa_train.data.datasets import check_output_dir
from sasa_train.data.fingerprint import differences
from sasa_train.data.hf_sets import check_hf
from sasa_train.data.loader import Loaders, build_loaders, fetch_once
from sasa_train.data.named_sets import check_dataset
from sasa_train.data.own_transform import check_transform
from sasa_train.device import RunPlan, check_compiled_code, compiles, resolve
from sasa_train.files import is_there, read_regular, write_atomic
from sasa_train.machine import available_memory, is_out_of_memory, keep_freed_memory
from sasa_train.models import build_model, check_model, check_val_size, enable_grad_checkpointing
from sasa_train.models.layers import LocalSelfAttention2d
from sasa_train.processes import collectives
from sasa_train.processes.ranks import local_rank
from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, ExpectedFailure
from sasa_train.runs.begun import find_begun
from sasa_train.runs.chance import Chance
from sasa_train.runs.checkpoint import CheckpointError, Checkpoints, first_misfit
from sasa_train.runs.folder import RunFolder, check_data, is_finished, open_run
from sasa_train.runs.metrics import end_of
from sasa_train.runs.preprocessing import with_preprocessing
from sasa_train.runs.provenance import conditions, describe_changes, provenance
from sasa_train.runs.weights import Weights, load_into, read_weights
from sasa_train.signals import StopRequest
from sasa_train.terminal import printable, say, some, warn
from sasa_train.training.announce import (
    describe_end,
    describe_finished,
    describe_keys,
    describe_plan,
    describe_stop,
    why_early,
)
from sasa_train.training.distillation import Teacher, load_teacher_together
from sasa_train.training.freezing import freeze
from sasa_train.training.hooks import OwnCodeError, load_hooks
from sasa_train.training.loop import Loop
from sasa_train.training.memory import OutOfMemoryError, check_memory, memory_advice, settle_auto
from sasa_train.training.model_source import settle_model
from sasa_train.training.optim import (
    build_optimizer,
    build_schedule,
    check_saved,
    check_schedule,
    try_loaded,
    try_optimizer,
)
from sasa_train.training.own_images import settle_open_keys
from sasa_train.training.own_loss import check_loss
from sasa_train.training.state import TrainState, build_state
from sasa_train.training.step import Stepper
from sasa_train.training.trackers import check_trackers, end_trackers, tracker_id
from sasa_train.training.utilisation import check_budget, count_step, describe_compute


class Ended(NamedTuple):
    """A run's folder, and whether it is (or was already) finished; otherwise it was stopped and saved.

    `best` is what the checkpoint says of best.pt: {"top1", "step", "epoch"} and trainer.best_metric, or None.
    """

    path: Path
    finished: bool
    best: dict[str, Any] | None


def train(config: TrainConfig, stop: StopRequest) -> Ended:
    """Train as configured until the run is finished or a stop is requested; `stop` then has the reason.

    Raises:
        ConfigError: the config or an input is refused before training starts.
        CheckpointError: there is no intact checkpoint to continue from, or a checkpoint cannot be written.
        NonFiniteError: a loss or weight is not finite; the message names the step, the module and the images. Such
            weights are never saved.
        OutOfMemoryError: a step does not fit in memory; the message names the keys to change.
        OwnCodeError: a hook of the user's own has failed. Errors of their other code are raised as they are.
    """
    if compiles(config):
        collectives.everywhere(check_compiled_code, ConfigError)
    run_name, config = collectives.from_first(lambda: name_of(config))
    collectives.from_first(lambda: check_trackers(config.logger), ConfigError)
    collectives.from_first(lambda: check_output_dir(config), ConfigError)
    # The first process alone chooses, because it alone accesses the run folder.
    config = collectives.from_first(lambda: settle(config, run_name), ConfigError, CheckpointError)
    plan = collectives.everywhere(lambda: plan_buildable(config), ConfigError)
    run = open_together(plan.config, run_name)
    with run.lock or contextlib.nullcontext(), run.discarded_if_refused():
        if run.checkpoint is not None:
            plan = dataclasses.replace(plan, config=as_begun(plan.config, run.checkpoint["config"]))
            run.keep_places(plan.config)
        # The first process resolves `auto`, because only it accesses the run folder.
        config = collectives.from_first(lambda: settle_auto(plan, run), ConfigError)
        plan = dataclasses.replace(plan, config=config)
        # The config is written with the resolved value of `auto`, before anything can stop the run.
        if run.is_new:
            run.write_config(plan.config)
        # The run may have been killed after the last checkpoint but before its end was recorded, so record it again.
        elif run.checkpoint is not None and is_finished(run.checkpoint, plan.config):
            run.write_end(run.checkpoint, why_early(plan.config, run.checkpoint["metrics"]))
            say(describe_finished(run.path, run.checkpoint, plan.config))
            return Ended(run.path, True, run.checkpoint["best"])
        return train_in_folder(plan, run, stop)


def name_of(config: TrainConfig) -> tuple[str, TrainConfig]:
    """Return what `find_begun` does; say if it found the run by images that the command writes in another way."""
    name, begun = find_begun(config, Path(config.output_dir))
    if begun != config:
        here = printable(Path(config.output_dir, name))
        say(f"{printable(config.data.place)}: {here} was begun on the same images, so this is its command", sys.stderr)
    return name, begun


def settle(config: TrainConfig, run_name: str) -> TrainConfig:
    """Replace what a source or the images determine (see `settle_model` and `settle_open_keys`) by plain values."""
    return settle_open_keys(settle_model(config, run_name), run_name)


def train_in_folder(plan: RunPlan, run: RunFolder, stop: StopRequest) -> Ended:
    """Train in a run folder that has been opened and locked, continuing from its checkpoint if there is one."""
    if warning := collectives.restart_warning():
        warn(warning)
    collectives.everywhere(lambda: check_checkpoint(plan, run), ConfigError)
    stop.set_max_hours(plan.trainer.max_hours)
    if plan.device.type == "cpu":
        keep_freed_memory()
    weights, preprocessing = read_weights_together(plan.config, run), ""
    if weights is not None:
        config, preprocessing = with_preprocessing(plan.config, weights.preprocessing)
        plan = dataclasses.replace(plan, config=config)
        run.write_config(config)
    teacher = load_teacher_together(plan, run)
    loaders = load_together(plan, run)
    if teacher is not None:
        teacher.match_together(loaders.classes)
    collectives.everywhere(lambda: check_loss(plan, len(loaders.classes)), ConfigError)
    say(describe_keys(plan.config, run.path))
    plan, uncounted = with_steps(plan, loaders)
    run.provenance, difference = provenance(run.as_written(plan.config))
    run.provenance |= tracker_id(run, plan.config.logger)
    run.provenance |= {} if teacher is None else {"teacher_sha256": teacher.sha256}
    if run.given and run.checkpoint is not None:
        run.provenance["directory"] = run.checkpoint["provenance"]["directory"]
    # The seed is set here, so that the initial weights do not depend on random numbers drawn earlier.
    torch.manual_seed(plan.config.seed)
    model = build_model(plan.config.model, len(loaders.classes), plan.input_size)
    begin_with(weights, model, loaders.classes, run, plan.config, preprocessing)
    del weights  # they take as much memory as the model
    stepper = build_stepper(plan, model, loaders.class_weights, teacher)
    compile_together(plan, model)
    note_conditions(plan, model, run)
    collectives.everywhere(lambda: continue_from(run, stepper.state, plan.config), ConfigError)
    loop = Loop(run, loaders, stepper, stop)
    say(describe_plan(plan, loaders, stepper, describe_compute(plan, uncounted)))
    run.write_start(difference, stepper.state.step)
    return Ended(run.path, run_to_the_end(loop), stepper.state.best)


def run_to_the_end(loop: Loop) -> bool:
    """Run all steps, then record and print how the run ended; return True if it is finished."""
    plan, run, state = loop.plan, loop.run_folder, loop.state
    try:
        with logging_redirect_tqdm():  # log lines appear above the progress bar
            finished = loop.run()
    except BaseException as error:
        run.try_write_info(status="interrupted" if loop.stop.came_early else "failed")
        if isinstance(error, Exception):  # otherwise, the process is to end now
            end_trackers(loop.trackers, "failed", state.best)
        if is_out_of_memory(error) and not isinstance(error, OwnCodeError):  # whose text is the user's
            raise OutOfMemoryError(memory_advice(plan, run.path, error)) from error
        raise
    finally:
        loop.logger.close()
        loop.loaders.close()
        num_unreadable = note_unreadable(run.path / "unreadable.txt", loop.loaders) if run.is_ours() else 0
    if finished:
        end = {
            "best": state.best,
            "step": state.step,
            "metrics": loop.logger.metrics,
            "config": to_yaml(run.as_written(plan.config)),
        }
        run.write_end(end, why_early(plan.config, loop.logger.metrics))
        counts = [found["num_images"] for found in loop.loaders.fingerprint["val"]["classes"]]
        run.write_info(seconds=round(state.seconds, 1), num_val_images=sum(counts))
        end_trackers(loop.trackers, "finished", state.best)
        say(describe_end(plan.config, run.path, state, loop.logger.metrics, num_unreadable, Chance.among(counts)))
    else:
        status = "stopped" if loop.stop.asked_by else "interrupted"
        run.write_info(status=status, reason=loop.stop.reason, best=state.best, **end_of(loop.logger.metrics))
        end_trackers(loop.trackers, status, state.best)
        say(describe_stop(plan.config, run.path, state, loop.stop.reason))
    # torchrun terminates all processes as soon as one exits with 75.
    collectives.wait_for_all()
    return finished


def check_checkpoint(plan: RunPlan, run: RunFolder) -> None:
    """Raise ConfigError if the checkpoint's weights are not this config's, before they are loaded or images read."""
    if run.checkpoint is None:
        return
    model = check_model(plan.config.model, plan.input_size, len(run.checkpoint["classes"]))
    for key in ("model", "ema"):
        if run.checkpoint[key] is not None and (wrong := first_misfit(model, run.checkpoint[key])):
            raise _misfit(run, plan.config, f"{key}.{wrong}")


def _misfit(run: RunFolder, config: TrainConfig, reason: object) -> ConfigError:
    asked = f"; allow_config_change={config.allow_config_change} asks too much of it"
    return ConfigError(
        f"{run.path}: the checkpoint does not fit this model or optimizer ({reason})"
        + (asked if config.allow_config_change else "; bring back the one that the run wrote")
    )


def plan_buildable(config: TrainConfig) -> RunPlan:
    """Resolve a config; raise ConfigError if its model, optimizer or schedule cannot be built."""
    device, config = resolve(config)
    check_buildable(plan := RunPlan(config, device))
    return plan


def read_weights_together(config: TrainConfig, run: RunFolder) -> Weights | None:
    """Return the weights of `model.pretrained`, read by the first process, or None if they are not needed."""
    # If there is a checkpoint, its weights are used instead.
    if run.checkpoint is not None or config.model.pretrained is None:
        return None
    return collectives.from_first(lambda: read_weights(config), ConfigError)


def load_together(plan: RunPlan, run: RunFolder) -> Loaders:
    """Load the images on all processes; raise ConfigError if they differ between machines or from the checkpoint's."""
    config, checkpoint = plan.config, run.checkpoint
    collectives.everywhere(lambda: fetch_once(config), ConfigError)
    memory = min(collectives.gather(available_memory(plan.device)))
    loaders = collectives.everywhere(lambda: build_loaders(config, plan.device, memory), ConfigError, ExpectedFailure)
    first = collectives.from_first(lambda: loaders.fingerprint)
    collectives.everywhere(lambda: check_same_images(config, first, loaders.fingerprint), ConfigError)
    if checkpoint is not None:
        collectives.everywhere(lambda: check_data(checkpoint, loaders.fingerprint, config), ConfigError)
    return loaders


def with_steps(plan: RunPlan, loaders: Loaders) -> tuple[RunPlan, str]:
    """Return the plan with its steps and their FLOPs, which need the images, and why these cannot be counted."""
    config, num_classes = plan.config, len(loaders.classes)
    flops, uncounted = collectives.from_first(lambda: count_step(config, num_classes), ConfigError)
    return dataclasses.replace(plan, steps_per_epoch=loaders.train.plan.steps_per_epoch, step_flops=flops), uncounted


def note_conditions(plan: RunPlan, model: nn.Module, run: RunFolder) -> None:
    """Record what shapes the last bits of the results, and warn of all changes since the checkpoint."""
    run.provenance |= conditions(plan, model)
    if run.checkpoint is not None and (changes := describe_changes(run.checkpoint["provenance"], run.provenance)):
        warn("\n  ".join(["changed since the checkpoint was written:", *changes]))


def build_stepper(
    plan: RunPlan, model: nn.Module, class_weights: np.ndarray | None = None, teacher: Teacher | None = None
) -> Stepper:
    """Build the training state and the stepper for a model."""
    if plan.trainer.grad_checkpointing:
        enable_grad_checkpointing(model)
    if plan.trainer.sync_batch_norm and plan.world_size > 1:
        model = convert_sync_batchnorm(model)
    freeze(model, plan.trainer.train_only)
    state = build_state(plan.config, model, plan.device)
    schedule = build_schedule(plan.config, state.optimizer, plan.steps_per_epoch, plan.step_flops)
    return Stepper(plan, state, schedule, class_weights, teacher)


def compile_together(plan: RunPlan, model: nn.Module) -> None:
    """Compile the attention kernels for a GPU before the first step, on one process of each machine."""
    uses_triton = any(isinstance(x, LocalSelfAttention2d) and x.backend in ("auto", "triton") for x in model.modules())
    if plan.device.type != "cuda" or not uses_triton:
        return
    if local_rank() == 0 and importlib.util.find_spec("triton") is not None:
        # Importing Triton takes a second, so it is imported only when it is needed.
        from sasa_train.attention.compiling import compile_ahead, launches_of
        from sasa_train.attention.triton_kernels import INTERPRETED, unavailable_on

        layout = torch.channels_last if plan.trainer.channels_last else torch.contiguous_format
        try:
            if not INTERPRETED and unavailable_on(plan.device) is None:
                compile_ahead(launches_of(model, plan.input_size, plan.device, layout, plan.autocast()))
        except Exception as error:
            warn(f"the attention kernels are compiled one by one, when they are first used, because of {error!r}")
    collectives.wait_for_all()  # the other processes then find the kernels in Triton's cache


def begin_with(
    weights: Weights | None,
    model: nn.Module,
    classes: list[str],
    run: RunFolder,
    config: TrainConfig,
    preprocessing: str,
) -> None:
    """Load the weights of `model.pretrained` and record their SHA-256 and a report; a resumed run keeps its record.

    preprocessing: the report's line about the preprocessing that the run took.
    """
    if weights is not None:
        source = printable(str(config.model.pretrained))
        loaded = collectives.everywhere(lambda: load_into(model, weights, classes, source), ConfigError)
        report = f"{loaded.describe()}\n{preprocessing}"
        say(f"pretrained  {source}\n{textwrap.indent(report, ' ' * 12)}")
        run.provenance |= {"pretrained_sha256": weights.sha256, "pretrained_report": report}
    elif run.checkpoint is not None and config.model.pretrained is not None:
        before = run.checkpoint["provenance"]
        run.provenance |= {key: before.get(key) for key in ("pretrained_sha256", "pretrained_report")}


def open_together(config: TrainConfig, run_name: str) -> RunFolder:
    """Open the run on the first process and send the checkpoint to the others, which may use a different disk."""
    opened: list[RunFolder] = []

    def opening() -> tuple[Path, dict[str, Any] | None, bool]:
        run = open_run(config, run_name)
        opened.append(run)
        return run.path, run.checkpoint, run.is_new

    path, checkpoint, is_new = collectives.from_first(opening, ConfigError, CheckpointError)
    return opened[0] if opened else RunFolder(path, None, Checkpoints(path, 0), checkpoint, is_new)


def check_same_images(config: TrainConfig, first: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ConfigError if this machine's images differ from those of the first process."""
    if found := [line for split in first for line in differences(first[split], here[split], split)]:
        where = f"{config.data.place}: the images on {platform.node()} are not the first process's:"
        raise ConfigError("\n  ".join([where, *found]) + "\ngive every machine the same ones")


def note_unreadable(path: Path, loaders: Loaders) -> int:
    """Add the unreadable images to the run's list, and return the number of lines in it.

    A disk that fails then is only warned of, so that it does not hide why the run ended.
    """
    lines = dict.fromkeys(loaders.unreadable())
    try:
        before = read_regular(path).decode(errors="replace").splitlines() if is_there(path) else []
        lines = dict.fromkeys([*before, *lines])
        if len(lines) > len(before):
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        warn(f"{path}: unreadable images cannot be noted ({error.strerror}): {some(list(lines))}")
    return len(lines)


def continue_from(run: RunFolder, state: TrainState, config: TrainConfig) -> None:
    """Load the checkpoint that the run continues from, if there is one, and free everything except its metrics."""
    if run.checkpoint is None:
        return
    try:
        state.load_state_dict(run.checkpoint)
        check_saved(config, state.model, run.checkpoint)
        try_loaded(config, state.model, state.optimizer)
    except LIBRARY_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise _misfit(run, config, error) from error
    run.metrics, run.checkpoint = run.checkpoint["metrics"], None
    run.write_config(config)


def check_buildable(plan: RunPlan) -> None:
    """Build the model (without weights), optimizer and schedule, to reject invalid settings before data is loaded."""
    config = plan.config
    check_transform(config.augment, plan.input_size, config.seed)
    if config.data.target is not None:
        own_code.load("data.target", config.data.target)
    if config.data.dataset is not None:
        (check_hf if config.data.name == "hf" else check_dataset)(config.data)
    model = check_model(config.model, plan.input_size)
    check_val_size(config.model, plan.input_size, plan.val_input_size)
    check_memory(plan, model)
    freeze(model, config.trainer.train_only)
    if config.trainer.grad_checkpointing:
        enable_grad_checkpointing(model)
    check_budget(config, expected_num_classes(config) or 2)
    # The data set is not known yet, so an epoch of 1000 steps is assumed.
    whole = with_values(config, {"trainer.max_steps": None, "trainer.max_pflops": None})
    check_schedule(whole, build_optimizer(config, model), steps_per_epoch=1000)
    try_optimizer(config, plan.device)
    load_hooks(config.hooks)
    if (num_classes := expected_num_classes(config)) is not None:  # otherwise, the images tell
        check_loss(plan, num_classes)
