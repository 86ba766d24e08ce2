"""Whether the micro-batches that data workers queue fit into shared memory, of which a container may have little.

Where it is full, a worker dies of SIGBUS in the middle of a run.
"""

import math
import shutil
import sys
from pathlib import Path

from sasa_train.data.workers import PREFETCH
from sasa_train.processes.ranks import local_world_size
from sasa_train.refusal import ConfigError

FOLDER = Path("/dev/shm")


def queue_bytes(num_workers: int, batch_size: int, num_images: int, size: int) -> int:
    """Of the uint8 [B, S, S, 3] that wait, and of one under way, for each worker; never more than the whole set."""
    return min(num_workers * (PREFETCH + 1) * batch_size, num_images) * 3 * size**2


def check_shared_memory(needed: int, num_workers: int, remedy: str = "") -> None:
    """Refuse `needed` bytes, for each process on this machine, that are not free. Only Linux shows what is.

    Raises:
        ConfigError: with `remedy` beside those that always help.
    """
    if not num_workers or sys.platform != "linux" or not FOLDER.is_dir():
        return
    free, needed = shutil.disk_usage(FOLDER).free, needed * local_world_size()
    if needed > free:
        gigabytes = math.ceil(1.5 * needed / 2**30)
        raise ConfigError(
            f"data.num_workers={num_workers}: their queues take up to {needed / 2**20:,.0f} MiB of shared memory, but "
            f"{FOLDER} has {free / 2**20:,.0f} MiB free; give the container more (docker run --shm-size={gigabytes}g), "
            f"or use data.num_workers={num_workers * free // needed}{remedy}"
        )
