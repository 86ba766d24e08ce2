"""Choose a micro-batch size that fits in memory (trainer.micro_batch_size=auto); give advice if memory runs out."""

import dataclasses
import gc
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sasa_train.config import own_code
from sasa_train.config.derived import (
    expected_num_classes,
    in_pixels,
    input_size,
    micro_batch_size,
    with_micro_batch_size,
)
from sasa_train.config.keys import TrainConfig
from sasa_train.config.saved import load_config, load_config_file
from sasa_train.device import RunPlan
from sasa_train.machine import available_memory, is_out_of_memory, peak_memory, total_memory
from sasa_train.models import build_model, enable_grad_checkpointing
from sasa_train.models.counting import count_layers
from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, ExpectedFailure, shorten
from sasa_train.runs.folder import RunFolder
from sasa_train.training.optim import backward
from sasa_train.training.state import build_state

SHARE = 0.5  # fraction of the free CPU memory for activations; gradients and temporaries need the rest
CUDA_SHARE = 0.9  # fraction of the device's memory that a trial step may use, because fragmentation grows later
# Phrases, besides "out of memory", with which libraries report that a batch is too large.
TOO_LARGE = ("32-bit index", "CUDNN_STATUS_NOT_SUPPORTED", "unable to find an engine", "CUBLAS_STATUS_ALLOC_FAILED")


def check_memory(plan: RunPlan, model: nn.Module) -> None:
    """Check that the weights, gradients and largest output fit in memory; a training step needs even more.

    Args:
        model: the model on the meta device.

    Raises:
        ConfigError: these tensors exceed the device's memory (the machine's, on a CPU), or the model cannot be
            trained with these micro-batches, e.g. because batch norm gets a single value per channel.
    """
    trainer, device = plan.trainer, plan.device
    micro_batch = min(2, plan.micro_batch_size) if trainer.micro_batch_size == "auto" else plan.micro_batch_size
    own = plan.config.model.target
    named = f"model.target={own}" if own is not None else f"model.name={plan.config.model.name}"
    what = f"{named} on micro-batches of {micro_batch:,} images of {in_pixels(plan.input_size)}"
    remedy = (
        "; change data.image_size, model.width or num_classes, or trainer.global_batch_size, micro_batch_size or "
        "grad_accum_steps"
    )
    try:
        outputs = largest_output(model, torch.empty(micro_batch, *plan.input_size, device="meta"))
    except Exception as error:
        if own is not None:  # it may need real weights and images
            outputs = _largest_of_own(plan, micro_batch, what)
        elif isinstance(error, LIBRARY_ERRORS):
            raise ConfigError(f"{what}: {shorten(error)}{remedy}") from error
        else:
            raise
    weights = 2 * 4 * sum(p.numel() for p in model.parameters())
    needed = weights + outputs * (4 if trainer.precision == "fp32" else 2)
    # This is not the free memory, because the file cache counts as used although the system would release it.
    there = total_memory(device)
    if needed > there:
        raise ConfigError(
            f"{what} needs more than {needed / 2**30:,.1f} GiB ({weights / 2**30:,.1f} for weights and gradients), but "
            f"{device} has {there / 2**30:,.1f} GiB{remedy}"
        )


def _largest_of_own(plan: RunPlan, micro_batch: int, what: str) -> int:
    """Do the same for a model of the user's own on the CPU, with two images, if there are as many, for speed."""
    few = min(2, micro_batch)
    with own_code.errors_of(what), torch.random.fork_rng(devices=[]):
        model = build_model(plan.config.model, plan.config.model.num_classes or 10, plan.input_size)
        return micro_batch // few * largest_output(model, torch.zeros(few, *plan.input_size))


def largest_output(model: nn.Module, images: torch.Tensor) -> int:
    """Return the number of elements in the largest layer input or output, in train mode without gradients."""
    largest = images.numel()

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    with torch.no_grad(), register_module_forward_hook(note):
        model.train()(images)
    return largest


def settle_auto(plan: RunPlan, run: RunFolder) -> TrainConfig:
    """Replace `auto` with the size that the run started with or, for a new run, the largest size that fits now.

    Raises:
        ConfigError: not even a single image fits.
    """
    if plan.trainer.micro_batch_size != "auto":
        return plan.config
    if began_with := _saved_size(run, plan.world_size):
        found = next(n for n in divisors(plan.images_per_step) if n <= began_with)
    else:
        found = largest_micro_batch(plan)
        print(f"trainer.micro_batch_size=auto: {found} images fit")
    return dataclasses.replace(plan.config, trainer=with_micro_batch_size(plan.trainer, found))


# The size is stored in the run's checkpoint or, before the first checkpoint, in config.yaml. A restart must use
# the same size, even if the available memory has changed, because a different size would change the run.
def _saved_size(run: RunFolder, world_size: int) -> int | None:
    if run.checkpoint is not None:
        saved = load_config(run.checkpoint["config"]).trainer
    elif (config_file := run.path / "config.yaml").exists():
        saved = load_config_file(config_file).trainer
    else:
        return None
    return None if saved.micro_batch_size == "auto" else micro_batch_size(saved, world_size)


def largest_micro_batch(plan: RunPlan) -> int:
    """Return the largest divisor of a process's share of the global batch that fits in memory."""
    # Sizes are tried on CUDA, but computed on a CPU, where a trial would cause swapping.
    fits = _fits_cuda if plan.device.type == "cuda" else _fits_cpu
    try:
        for size in divisors(plan.images_per_step):
            if fits(plan, size):
                return size
    finally:
        if plan.device.type == "cuda":  # the trials must not count toward the run's peak memory
            _forget_peak(plan.device)
    raise ConfigError(
        f"trainer.micro_batch_size=auto: not even one image of {in_pixels(plan.input_size)} fits into the memory of "
        f"{plan.device}; use trainer.grad_checkpointing=true, a smaller model or data.image_size"
    )


def _forget_peak(device: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _build(config: TrainConfig) -> nn.Module:
    model = build_model(config.model, expected_num_classes(config) or 1000, input_size(config.data))
    if config.trainer.grad_checkpointing:
        enable_grad_checkpointing(model)
    return model


def _fits_cpu(plan: RunPlan, num_images: int) -> bool:
    with torch.device("meta"):
        total = count_layers(_build(plan.config), plan.input_size)[-1]
    weights = 4 * 4 * total.params  # including gradient, momentum and average
    return num_images * total.activation_bytes <= SHARE * (available_memory(plan.device) - weights)


def _fits_cuda(plan: RunPlan, num_images: int) -> bool:
    """Return whether a training step with `num_images` images leaves a tenth of the device's memory free."""
    device = plan.device
    _forget_peak(device)
    try:
        state = build_state(plan.config, _build(plan.config), device)
        layout = torch.channels_last if plan.trainer.channels_last else torch.contiguous_format
        images = torch.zeros(num_images, *plan.input_size, device=device).to(memory_format=layout)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        with plan.autocast():
            loss = nn.functional.cross_entropy(state.model.train()(images).float(), labels)
        backward(loss, state.optimizer)
        state.optimizer.step()
    except RuntimeError as error:  # includes torch.OutOfMemoryError
        if is_out_of_memory(error) or any(text in str(error) for text in TOO_LARGE):
            return False
        raise
    return torch.cuda.max_memory_reserved(device) <= CUDA_SHARE * torch.cuda.mem_get_info(device)[1]


class OutOfMemoryError(ExpectedFailure):
    """Raised if training runs out of memory; the message states the memory in use and the keys to change."""


def memory_advice(plan: RunPlan, run_dir: Path, error: BaseException) -> str:
    """Format the message of an OutOfMemoryError: the memory in use and the keys that reduce it."""
    trainer, device, micro = plan.trainer, plan.device, plan.micro_batch_size
    smaller = next((n for n in divisors(plan.images_per_step) if n <= micro / 2), None)
    ways = [f"trainer.micro_batch_size={smaller} (the same global batch)"] if smaller else []
    ways += [] if trainer.grad_checkpointing else ["trainer.grad_checkpointing=true"]
    ways += ["trainer.precision=bf16"] if device.type == "cuda" and trainer.precision == "fp32" else []
    ways += ["a smaller data.image_size"]
    return (
        f"{device} is out of memory with micro-batches of {micro} images of {in_pixels(plan.input_size)}: "
        f"{peak_memory(device) / 2**20:,.0f} MiB were in use at most, {available_memory(device) / 2**20:,.0f} MiB are "
        f"free now ({str(error).partition(chr(10))[0]}). Try {', or '.join(ways)}. Where there is a checkpoint, go on "
        f"with sasa-train resume={run_dir} trainer.micro_batch_size=... "
        "'allow_config_change=[trainer.micro_batch_size,trainer.grad_accum_steps]'"
    )


def divisors(number: int) -> list[int]:
    """Return all divisors of `number` in descending order."""
    return [n for n in range(number, 0, -1) if number % n == 0]
