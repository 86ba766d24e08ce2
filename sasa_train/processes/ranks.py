"""Which of a run's processes this one is. torchrun tells in environment variables, so this needs no torch."""

import os


def rank() -> int:
    """This process's global rank. Rank 0 writes the run folder and prints."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train this run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its machine, which is also the number of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of processes that share this machine's processors and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def max_restarts() -> int:
    """How often torchrun may start all processes anew after one fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def num_machines() -> int:
    """The number of torchruns that work together, one per machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def num_restarts() -> int:
    """How often torchrun has started all processes anew; 0 on several machines."""
    # Several torchruns do not count alike, and a number that differs would part the processes.
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if num_machines() == 1 else 0
