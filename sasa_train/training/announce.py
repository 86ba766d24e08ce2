"""Format the summaries that a run prints before its first step and after its last."""

import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasa_train.config import own_code
from sasa_train.config.compose import as_overrides
from sasa_train.config.derived import in_pixels
from sasa_train.config.keys import DATA_SETS, TrainConfig
from sasa_train.config.own_keys import imports_for, targets_of
from sasa_train.data.class_names import look_alikes
from sasa_train.data.class_weights import describe_weights
from sasa_train.data.datasets import Files
from sasa_train.data.decoding import decoding_of
from sasa_train.data.doubtful import doubts_about_pixels
from sasa_train.data.loader import Loaders
from sasa_train.device import RunPlan
from sasa_train.machine import peak_memory
from sasa_train.runs.chance import Chance, remedy
from sasa_train.runs.metrics import describe_value, is_out_of_patience, last_val, lost_best, parse_log
from sasa_train.terminal import COMMAND, columns, duration, printable, some, with_command
from sasa_train.training.freezing import describe_trained
from sasa_train.training.optim import peak_lr
from sasa_train.training.state import TrainState
from sasa_train.training.step import Stepper

OF_VAL = ("model.target", "data.target")  # the code that sasa-evaluate runs
LITTLE = 0.02  # share of the peak learning rate at which little changes any more
CROWDED = 1.5  # load (programs that want to compute, in the last minute) per processor
CROWDED_OUT = 0.25  # share of the time for which the threads that compute were ready, but had no processor


def describe_keys(config: TrainConfig, run_dir: Path, note: str = "where config.yaml has all keys") -> str:
    """Format the keys that differ from the defaults or are on the command line."""
    width = min(68, max(20, (columns(sys.stdout) or 80) - 12))
    named = {word.partition("=")[0] for word in sys.argv[1:] if "=" in word}
    keys = "\n".join(_wrapped("  ".join(as_overrides(replace(config, derive=[]), named - {"derive"})), width))
    return table({"run folder": f"{run_dir}, {note}", "keys": keys})


def describe_plan(plan: RunPlan, loaders: Loaders, stepper: Stepper, compute: str) -> str:
    """Format the values derived from the config: device, sizes, batch, learning rate and, when resuming, the step.

    compute: the FLOPs of the run in words.
    """
    config, train, val, state = plan.config, loaders.train.plan, loaders.val.plan, stepper.state
    num_parameters = sum(p.numel() for p in state.model.parameters())
    batch = f"{config.trainer.global_batch_size}"
    if plan.world_size > 1:
        batch += f" = {plan.world_size} processes x {plan.grad_accum_steps} x {plan.micro_batch_size}"
    elif plan.grad_accum_steps > 1:
        batch += f" = {plan.grad_accum_steps} x {plan.micro_batch_size}"
    missing = [entry["name"] for entry in loaders.fingerprint["val"]["classes"] if not entry["num_images"]]
    mode = "" if config.data.mode == "rgb" else f" in {config.data.mode}"
    of_val = "" if plan.val_input_size == plan.input_size else f" (val: {in_pixels(plan.val_input_size)})"
    lines = {
        "device": f"{state.device}, {config.trainer.precision}",
        **({"threads": threads} if (threads := describe_crowding(state.device)) else {}),
        "model": f"{config.model.title}, {num_parameters:,} parameters",
        **({"training": trained} if (trained := describe_trained(state.model)) else {}),
        "data": f"{printable(config.data.title)}, {train.num_images:,} train and {val.num_images:,} val images of "
        f"{in_pixels(plan.input_size)}{of_val}{mode}, {len(loaders.classes)} classes, {loaders.kind}",
        **({"classes": named} if (named := describe_classes(config, loaders)) else {}),
        **({"val": f"no images of {some(missing)}: left out of f1_macro and balanced_accuracy"} if missing else {}),
        **({"balance": balance} if (balance := describe_balance(config, loaders)) else {}),
        "batch": f"{batch} images per step, {plan.steps_per_epoch:,} steps per epoch, {plan.num_steps:,} in all",
        "compute": compute,
        "lr": f"{peak_lr(config):g} at its peak ({config.optimizer.lr:g} {config.optimizer.lr_basis})",
    }
    if config.augment.mixup or config.augment.cutmix:
        lines["mixing"] = "within a micro-batch, so another accumulation or number of processes is another run"
    if state.step:
        lines["continues"] = (
            f"at step {state.step:,}, epoch {state.epoch + 1}; top1: {describe_best(config, state.best)}"
        )
        ends = {"trainer.epochs", "trainer.max_steps", "trainer.max_pflops"}
        is_longer = not ends.isdisjoint(config.allow_config_change)
        if is_longer and (lr := stepper.next_lr()) < LITTLE * peak_lr(config):
            longer = "a new run with more trainer.epochs changes more than further ones at its end"
            lines["continues"] += f"\nlr {lr:.2g}, the end of the schedule: {longer}"
    return table(lines) + "\n"


def describe_balance(config: TrainConfig, loaders: Loaders) -> str:
    """Say how classes of unequal frequency are balanced; "" if they are not."""
    parts = ["classes are drawn equally often"] if config.data.sampler == "balanced" else []
    if loaders.class_weights is not None:
        parts.append(describe_weights(loaders.classes, loaders.class_weights))
    elif config.trainer.class_weights is not None:
        parts.append("all class weights are equal, which changes nothing")
    return "; ".join(parts)


def describe_classes(config: TrainConfig, loaders: Loaders) -> str:
    """Name the classes of a set of the user's own with their numbers of train images, the most frequent first.

    Further lines name what may not be meant: folders within class folders, classes of nearly one name, dark or blank
    images.
    """
    if DATA_SETS[config.data.name].num_classes is not None:
        return ""
    counts = np.bincount(loaders.train_set.labels, minlength=len(loaders.classes))
    text = some([f"{loaders.classes[label]} {counts[label]:,}" for label in np.argsort(-counts, kind="stable")])
    source = loaders.train_set.source
    doubtful = source.doubtful if isinstance(source, Files) else ()
    pixels = doubts_about_pixels(loaders.train_set, decoding_of(config.data))
    return "\nWARNING: ".join([text, *doubtful, *look_alikes(loaders.classes), *pixels])


def describe_crowding(device: torch.device) -> str:
    """Say that other programs use the processors that several threads compute on, or return ""."""
    # These threads wait for one another in every layer, and one that gets no processor stops them all.
    num_threads, num_processors = torch.get_num_threads(), os.cpu_count() or 1
    if device.type != "cpu" or num_threads == 1 or not hasattr(os, "getloadavg"):
        return ""
    load = os.getloadavg()[0]
    if load <= CROWDED * num_processors:
        return ""
    return (
        f"{num_threads}, but other programs use these processors (load {load:.1f} on {num_processors}): "
        "OMP_NUM_THREADS=1 before the command may make it faster"
    )


def describe_threads(num_threads: int, waited: float) -> str:
    """Say why several threads on a CPU are slow, with the remedy.

    waited: share of the time for which they had no processor; 0 if this is unknown.
    """
    others = f"other programs had their processors for {waited:.0%} of the time"
    return (
        f"its {num_threads} threads wait for one another, and "
        f"{others if waited >= CROWDED_OUT else 'other programs may use the processors'}; stop it (Ctrl-C) and go on "
        "with fewer, as in OMP_NUM_THREADS=1 before the same command"
    )


def describe_end(
    config: TrainConfig, run_dir: Path, state: TrainState, metrics: str, num_unreadable: int, chance: Chance
) -> str:
    """Format the final summary: top1, time, images/s, peak memory, files and suggested next commands."""
    images = state.step * config.trainer.global_batch_size
    row = last_val(metrics)
    last = f"{row['top1']:.2f}" if row else "see metrics.jsonl"
    following = []
    if not _needs_caller(config):
        following += [f"sasa-report {run_dir}{imports_for(config)}"]
        following += [f"sasa-evaluate {run_dir}{imports_for(config, OF_VAL)}"]
    at_chance = row is not None and chance.explains(row["top1"])
    if len(list(run_dir.parent.glob("*/config.yaml"))) > 1:
        following.append(f"sasa-report --list {run_dir.parent}")
    if "tensorboard" in config.logger:
        following.append(f"tensorboard --logdir {run_dir.parent}")
    lines = {
        "top1": f"{last} at the end; {describe_best(config, state.best, metrics)}",
        **({"chance": describe_chance(config, chance, metrics)} if at_chance else {}),
        **({"ended": reason} if (reason := why_early(config, metrics)) else {}),
        "time": f"{duration(state.seconds)} of training, {images / max(state.seconds, 1e-9):,.0f} images/s",
        "memory": f"{peak_memory(state.device) / 2**20:,.0f} MiB at the peak",
        "checkpoints": f"best.pt, last.pt in {run_dir}/checkpoints",
        "log": f"{run_dir}/metrics.jsonl",
        **({"unreadable": f"{num_unreadable} images, named in {run_dir}/unreadable.txt"} if num_unreadable else {}),
        "next": "\n".join(following),
    }
    return "\n" + table(lines)


def describe_chance(config: TrainConfig, chance: Chance, metrics: str) -> str:
    """Say what to do about a top1 that guessing would reach."""
    rows = [row for row in parse_log(metrics) if row["split"] == "val"]
    losses = [row.get("loss") for row in rows]
    what = remedy(config.optimizer.lr, rows[-1]["step"], losses, chance.num_classes)
    return f"this top1 is not above {chance}: {what}"


def _needs_caller(config: TrainConfig) -> bool:
    """Whether a run needs objects that a Python program has passed, which no command can make."""
    return any(own_code.module_of(target) == own_code.GIVEN for target in targets_of(config))


def describe_stop(config: TrainConfig, run_dir: Path, state: TrainState, reason: str) -> str:
    """Format how a stopped run goes on; on a narrow terminal, the command to paste has a line of its own."""
    text = f"{reason}: saved at step {state.step}; to continue:"
    if _needs_caller(config):
        return f"{text} the same call of train_model again"
    text += "" if config.resume == "never" else " the same command again, or"
    return with_command(text, f"sasa-train resume={run_dir}{imports_for(config)}")


def describe_finished(run_dir: Path, checkpoint: dict[str, Any], config: TrainConfig) -> str:
    evaluate = f"sasa-evaluate {run_dir}{imports_for(config, OF_VAL)} evaluates it, "
    best = describe_best(config, checkpoint["best"], checkpoint["metrics"])
    ended = f", ended early by {reason}" if (reason := why_early(config, checkpoint["metrics"])) else ""
    return (
        f"{run_dir} is finished: {checkpoint['step']:,} steps, {best}{ended}. "
        f"Nothing to do; {'' if _needs_caller(config) else evaluate}resume=never trains it anew."
    )


def describe_best(config: TrainConfig, best: dict[str, Any] | None, metrics: str = "") -> str:
    """Format the best evaluation whose model is kept and, by the log, a better one whose save failed."""
    metric = config.trainer.best_metric
    kept = f"best {describe_value(best, metric)} after epoch {best['epoch']}" if best else "no evaluation yet"
    if lost := lost_best(metrics, best, metric):
        kept += f" (the model of {describe_value(lost, metric)} after epoch {lost['epoch']} was not kept)"
    return kept


def why_early(config: TrainConfig, metrics: str) -> str:
    """Say that `trainer.patience` has ended a run, by its log, and of what; "" if it has not."""
    trainer = config.trainer
    if not is_out_of_patience(trainer, metrics):
        return ""
    by = f" by more than trainer.min_delta={trainer.min_delta:g}" if trainer.min_delta else ""
    times = "an evaluation" if trainer.patience == 1 else f"{trainer.patience} evaluations in a row"
    return f"trainer.patience={trainer.patience}: {times} did not improve {trainer.best_metric}{by}"


def table(lines: dict[str, str]) -> str:
    """Format names and texts in two columns; on a terminal, texts but commands wrap within the second one."""
    width, rows = columns(sys.stdout), list[str]()
    for name, text in lines.items():
        parts = list[str]()
        for line in text.split("\n"):
            is_whole = width is None or COMMAND.match(line)
            parts += [line] if is_whole else _wrapped(line, max(20, (width or 0) - 12))
        rows += [f"{head:<11} {part}" for head, part in zip([name, *[""] * len(parts)], parts, strict=False)]
    return "\n".join(rows)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
