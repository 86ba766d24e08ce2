"""Ranks and process counts of a run, from torchrun's environment variables. This module does not import torch."""

import os


def rank() -> int:
    """Return this process's global rank. Rank 0 writes the run folder and prints."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes that train this run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's rank on its machine, which is also the index of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes that share this machine's processors and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def max_restarts() -> int:
    """Return how many times torchrun may restart all processes after one fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def num_machines() -> int:
    """Return the number of cooperating torchrun instances, one per machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def num_restarts() -> int:
    """Return how many times torchrun has restarted all processes; always 0 on several machines."""
    # Several torchrun instances may count differently, and processes with different counts could not find each other.
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if num_machines() == 1 else 0
