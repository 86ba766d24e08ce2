"""What to say, and to set, where memory did not suffice for a training step."""

from pathlib import Path

import torch

from sasa_train.config import TrainConfig, micro_batch_size, resolved_image_size
from sasa_train.machine import available_memory, peak_memory
from sasa_train.ranks import world_size


class OutOfMemoryError(Exception):
    """Memory did not suffice; the message has the numbers and what to set."""


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's and the CPU allocator's ways to say so."""
    texts = ("out of memory", "can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def memory_advice(config: TrainConfig, device: torch.device, run_dir: Path, error: BaseException) -> str:
    trainer = config.trainer
    micro = micro_batch_size(trainer, world_size())
    smaller = next((n for n in divisors(trainer.global_batch_size // world_size()) if n <= micro / 2), None)
    ways = [f"trainer.micro_batch_size={smaller} (the same global batch)"] if smaller else []
    ways += [] if trainer.grad_checkpointing else ["trainer.grad_checkpointing=true"]
    ways += ["trainer.precision=bf16"] if device.type == "cuda" and trainer.precision == "fp32" else []
    ways += ["a smaller data.image_size"]
    return (
        f"{device} is out of memory with micro-batches of {micro} images of {resolved_image_size(config.data)} pixels: "
        f"{peak_memory(device) / 2**20:,.0f} MiB were in use at most, {available_memory(device) / 2**20:,.0f} MiB are "
        f"free now ({str(error).partition(chr(10))[0]}). Try {', or '.join(ways)}. Where there is a checkpoint, go on "
        f"with sasa-train resume={run_dir} trainer.micro_batch_size=... "
        "allow_config_change=[trainer.micro_batch_size,trainer.grad_accum_steps]"
    )


def divisors(number: int) -> list[int]:
    """Descending."""
    return [n for n in range(number, 0, -1) if number % n == 0]
