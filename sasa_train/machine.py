"""What the machine has: a clock, processors, memory (bytes throughout), and how much of it was used.

Of a machine's own memory each of torchrun's processes there counts its part.
"""

import ctypes
import datetime
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.processes.ranks import local_world_size

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def usable_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory(device: "torch.device") -> int:
    """At the highest so far: the allocator's on CUDA, the process's on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: "torch.device") -> int:
    """What can still be taken without pushing anything out: the device's, or the machine's or its container's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(machine, _left_in_cgroup(CGROUPS), _left_in_cgroup(_own_cgroup())) // local_world_size()


def total_memory(device: "torch.device") -> int:
    """All that there is, taken or not: the device's, or the machine's or its container's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, _cgroup_limit(CGROUPS), _cgroup_limit(_own_cgroup())) // local_world_size()


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next step, instead of giving it back to the system.

    Large tensors would otherwise be fresh pages in every step, each filled by the system at its first touch: up to a
    tenth of a step on a CPU. Only glibc knows these settings; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # nothing outside the heap, where a free gives pages back at once
        mallopt(M_TRIM_THRESHOLD, -1)  # and the heap is never cut


def _own_cgroup() -> Path:
    """Of version 2, where a scheduler puts its jobs; a container sees its own as the root."""
    try:
        return CGROUPS / Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
    except OSError:
        return CGROUPS


def _cgroup_limit(folder: Path) -> int:
    try:
        return int((folder / "memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return sys.maxsize


def _left_in_cgroup(folder: Path) -> int:
    try:
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = int(statistics.get("inactive_file", 0))  # files read once: given back when asked for
        return _cgroup_limit(folder) - used + reclaimable
    except (OSError, ValueError):  # no such group, or another kind
        return sys.maxsize


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's and the CPU allocator's ways to say so."""
    texts = ("out of memory", "can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
