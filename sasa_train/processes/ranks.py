"""Which of a run's processes this one is: torchrun says so in environment variables, so that asking needs no torch."""

import os


def rank() -> int:
    """Of this process, over all machines. 0 writes the run folder and speaks for all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train this run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Of this process on its machine: the number of its CUDA device too."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many of the processes share this machine's processors and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def max_restarts() -> int:
    """How often torchrun starts all processes anew when one fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def num_machines() -> int:
    """How many torchruns work together."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def num_restarts() -> int:
    """How often torchrun has started all processes anew, where it is one alone: several do not count alike."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if num_machines() == 1 else 0
