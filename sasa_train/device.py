"""Apply a config to this machine: choose the device, precision, autocast and this process's share of the work."""

import contextlib
import copy
import dataclasses
import getpass
import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sasa_train.config.derived import (
    InputSize,
    accumulation,
    at_val_size,
    input_size,
    micro_batch_size,
    total_steps,
    with_micro_batch_size,
)
from sasa_train.config.keys import TrainConfig, TrainerConfig
from sasa_train.processes import collectives
from sasa_train.processes.ranks import rank, world_size
from sasa_train.refusal import ConfigError

CODE_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # variables of torch and Triton
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compiles(config: TrainConfig) -> bool:
    """Whether a run uses torch.compile; timm's kron compiles its functions."""
    return config.trainer.compile or "kron" in config.optimizer.name


def check_compiled_code() -> None:
    """Raise ConfigError if others may have put code into the folder in which torch.compile keeps its own."""
    # Its name in /tmp is known to all, and torch loads what it finds there. Even with TORCHINDUCTOR_CACHE_DIR, it keeps
    # compiled headers there. Triton keeps its kernels in ~/.triton or TRITON_CACHE_DIR.
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    # What is added from now on, in this process and in those that compile for it, only the user can write to.
    os.umask(os.umask(0o022) | 0o022)
    named = {name: Path(os.environ[name]) for name in CODE_FOLDERS if os.environ.get(name)}
    for name, folder in {"TMPDIR": Path(tempfile.gettempdir(), f"torchinductor_{user}"), **named}.items():
        _check_code_folder(folder, name)


def _check_code_folder(folder: Path, variable: str) -> None:
    with contextlib.suppress(FileExistsError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    others_write = _others_write(found)
    if is_own and others_write and not any(folder.iterdir()):  # torch has just made it under a wide umask
        folder.chmod(0o700)
    elif not is_own or others_write:
        raise ConfigError(
            f"{folder}: torch.compile loads code from it, but it belongs to somebody else, or others may write to it; "
            f"delete it, or name another folder with {variable}=..."
        )
    for inside in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run deletes what it needs no more
            found = inside.stat()  # of what a link leads to
            if _others_write(found) or {found.st_uid, inside.lstat().st_uid} - {os.geteuid(), 0}:
                raise ConfigError(
                    f"{inside}: torch.compile loads code from it, but it belongs to somebody else, or others may write "
                    f"to it; delete {folder}, or name another folder with {variable}=..."
                )


def _others_write(found: os.stat_result) -> int:
    # Where each user has a group of their own, with the same number, folders are made for it to write to.
    return found.st_mode & (0o002 if found.st_gid == found.st_uid else 0o022)


@dataclass(frozen=True)
class RunPlan:
    """A resolved config and the sizes derived from it for this process."""

    config: TrainConfig
    device: torch.device
    rank: int = field(default_factory=rank)
    world_size: int = field(default_factory=world_size)
    steps_per_epoch: int = 0  # 0 until the data set is known
    step_flops: int | None = None  # of a training step over all processes; None if unknown or not countable

    @property
    def trainer(self) -> TrainerConfig:
        return self.config.trainer

    @property
    def input_size(self) -> InputSize:
        return input_size(self.config.data)

    @property
    def val_input_size(self) -> InputSize:
        return input_size(at_val_size(self.config.data))

    @property
    def images_per_step(self) -> int:
        """Number of images in the global batch that this process handles."""
        return self.trainer.global_batch_size // self.world_size

    @property
    def micro_batch_size(self) -> int:
        return micro_batch_size(self.trainer, self.world_size)

    @property
    def grad_accum_steps(self) -> int:
        return accumulation(self.trainer, self.world_size)

    @property
    def num_steps(self) -> int:
        """Total number of steps in the run."""
        return total_steps(self.config, self.steps_per_epoch, self.step_flops)

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.trainer.precision)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def keep_to_thread_limit() -> None:
    """Use no more threads than OpenMP grants, because oneDNN's convolutions wait for the others forever.

    Raises:
        ConfigError: OpenMP may grant fewer threads at any time.
    """
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1"):
        raise ConfigError(
            "OMP_DYNAMIC=true: PyTorch's convolutions would wait forever for threads that OpenMP does not grant; unset "
            "it, and set OMP_NUM_THREADS instead"
        )
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdecimal() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def uses_cuda(trainer: TrainerConfig) -> bool:
    return torch.cuda.is_available() and trainer.device != "cpu"


def resolve(config: TrainConfig) -> tuple[torch.device, TrainConfig]:
    """Return the device, and the config with `precision=auto` and gradient accumulation resolved for it.

    This also sets torch's options for determinism and matrix precision.

    Raises:
        ConfigError: a CUDA device is requested but is missing or lacks bf16, or a feature that only CUDA supports is
            requested on the CPU.
    """
    trainer, has_cuda = copy.copy(config.trainer), torch.cuda.is_available()
    if trainer.device == "cuda" and not has_cuda:
        raise ConfigError("trainer.device=cuda, but torch sees no CUDA device; use trainer.device=auto or cpu")
    device = torch.device("cuda" if uses_cuda(trainer) else "cpu")
    keep_to_thread_limit()
    if world_size() > 1 and device.type == "cuda":
        collectives.use_own_device()
    if trainer.sync_batch_norm and device.type == "cpu":
        raise ConfigError(
            "trainer.sync_batch_norm=true, but PyTorch has it on CUDA alone; leave it out on the CPU: batch norm then "
            "sees each process's own micro-batches"
        )
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if trainer.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError(f"trainer.precision=bf16, but {torch.cuda.get_device_name()} has none; use fp16 or fp32")
    if trainer.precision == "auto":
        trainer.precision = "bf16" if has_bf16 else "fp32"
    if isinstance(trainer.micro_batch_size, int):
        trainer = with_micro_batch_size(trainer, trainer.micro_batch_size)
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it for cuBLAS
    torch.backends.cudnn.benchmark = not trainer.deterministic  # it times algorithms, and its choice may vary
    torch.use_deterministic_algorithms(trainer.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # otherwise every scratch buffer is filled with NaN
    torch.set_float32_matmul_precision(trainer.matmul_precision)
    torch.backends.cudnn.allow_tf32 = trainer.matmul_precision != "highest"  # the same for convolutions and attention
    return device, dataclasses.replace(config, trainer=trainer)
