"""What a run would be and take (sasa-train --plan), found by a few real steps in memory; no file is written.

As in run.py, all processes run this code in lockstep.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import torch

from sasa_train.config.keys import DataConfig, TrainConfig
from sasa_train.config.saved import as_begun
from sasa_train.data.datasets import check_output_dir, check_whole_set
from sasa_train.device import RunPlan
from sasa_train.machine import is_out_of_memory, peak_memory
from sasa_train.models import build_model
from sasa_train.processes import collectives
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import CheckpointError
from sasa_train.runs.folder import RunFolder, is_finished, look_at_run
from sasa_train.terminal import duration, say
from sasa_train.training.announce import describe_finished, describe_keys, describe_plan, table
from sasa_train.training.distillation import load_teacher_together
from sasa_train.training.evaluation import Batches
from sasa_train.training.memory import OutOfMemoryError, memory_advice, settle_auto
from sasa_train.training.run import (
    build_stepper,
    compile_together,
    continue_from,
    load_together,
    name_of,
    plan_buildable,
    settle,
    with_steps,
)
from sasa_train.training.step import Stepper, train_one_epoch
from sasa_train.training.trackers import check_trackers
from sasa_train.training.utilisation import describe_compute, peak_tflops, utilisation

TIMED = 3  # steps, after a first one, in which caches fill and kernels are compiled


def show_plan(config: TrainConfig) -> None:
    """Print what `train` would do with this config, without a run folder, a lock or a download of images.

    Raises the errors of `train` that precede training. Weights of model.pretrained are not read.
    """
    run_name, config = collectives.from_first(lambda: name_of(config))
    collectives.from_first(lambda: check_trackers(config.logger), ConfigError)
    collectives.from_first(lambda: check_output_dir(config), ConfigError)
    config = collectives.from_first(lambda: settle(config, run_name), ConfigError, CheckpointError)
    plan = collectives.everywhere(lambda: plan_buildable(config), ConfigError)
    collectives.everywhere(lambda: check_there(config.data), ConfigError)
    run = collectives.from_first(lambda: look_at_run(plan.config, run_name), ConfigError, CheckpointError)
    if run.checkpoint is not None:
        plan = dataclasses.replace(plan, config=as_begun(plan.config, run.checkpoint["config"]))
    config = collectives.from_first(lambda: settle_auto(plan, run), ConfigError)
    plan = dataclasses.replace(plan, config=config)
    if run.checkpoint is not None and is_finished(run.checkpoint, plan.config):
        say(describe_finished(run.path, run.checkpoint, plan.config))
        return
    _describe(plan, run)


def _describe(plan: RunPlan, run: RunFolder) -> None:
    teacher = load_teacher_together(plan, run)
    loaders = load_together(plan, run)
    try:
        if teacher is not None:
            teacher.match_together(loaders.classes)
        say(describe_keys(plan.config, run.path, "which --plan does not write"))
        plan, uncounted = with_steps(plan, loaders)
        torch.manual_seed(plan.config.seed)
        model = build_model(plan.config.model, len(loaders.classes), plan.input_size)
        stepper = build_stepper(plan, model, loaders.class_weights, teacher)
        compile_together(plan, model)
        collectives.everywhere(lambda: continue_from(run, stepper.state, plan.config), ConfigError)
        say(describe_plan(plan, loaders, stepper, describe_compute(plan, uncounted)).rstrip("\n"))
        step = stepper.state.step
        try:
            seconds = time_steps(stepper, batches_from(loaders.train.train_batches, step, plan.steps_per_epoch))
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(memory_advice(plan, run.path, error)) from error
            raise
        memory = collectives.largest(peak_memory(plan.device))
        say(describe_cost(plan, step, seconds, memory, loaders.val.plan.num_images))
    finally:
        loaders.close()


def check_there(data: DataConfig) -> None:
    """Raise ConfigError if images of torchvision's would have to be downloaded."""
    try:
        check_whole_set(data)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n--plan downloads no images, but needs them for the number of steps and their time: the command "
            "without --plan downloads them"
        ) from error


def batches_from(train_batches: Callable[[int, int], Batches], step: int, steps_per_epoch: int) -> Batches:
    """Yield the run's micro-batches from a step on, epoch after epoch."""
    for epoch in itertools.count(step // steps_per_epoch):
        yield from train_batches(epoch, step % steps_per_epoch)
        step = 0


def time_steps(stepper: Stepper, batches: Batches) -> list[float]:
    """Take a first step and TIMED others, and return the seconds of each, in which the device has finished them."""

    def ends() -> Iterator[float]:
        yield time.perf_counter()
        for _ in train_one_epoch(stepper, batches, 1 + TIMED, lambda step: False):
            if stepper.plan.device.type == "cuda":
                torch.cuda.synchronize()
            yield time.perf_counter()

    return [end - start for start, end in itertools.pairwise(ends())]


def describe_cost(plan: RunPlan, step: int, seconds: list[float], memory: float, num_val: int) -> str:
    """Format memory, speed and the duration of the steps from `step` on, by the seconds of each timed step."""
    first, *timed = seconds
    mean, trainer, left = sum(timed) / len(timed), plan.trainer, plan.num_steps - step
    speed = f"{mean:.3g} s per step ({min(timed):.3g} to {max(timed):.3g} s in {TIMED}; the first: {first:.3g} s)"
    speed += f", {trainer.global_batch_size / mean:,.0f} images/s"
    achieved = utilisation(plan, peak_tflops(plan), mean)
    speed += f", {achieved['tflops']:.3g} TFLOP/s" if achieved else ""
    speed += f", mfu {achieved['mfu']:.3g} %" if "mfu" in achieved else ""
    num_evaluations = -(-left // (plan.steps_per_epoch * trainer.eval_every_epochs))
    # A forward pass is about a third of a step's work.
    evaluation = mean / trainer.global_batch_size / 3 * num_val * (2 if trainer.ema_decay else 1)
    total = left * mean + num_evaluations * evaluation
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + total))
    return table(
        {
            "memory": f"{memory / 2**20:,.0f} MiB at the peak of these steps",
            "time": f"{speed}\n{duration(left * mean)} for {left:,} steps, and about "
            f"{duration(num_evaluations * evaluation)} for {num_evaluations:,} evaluations",
            "ETA": f"{duration(total)}: {end}, if it began now",
        }
    )
