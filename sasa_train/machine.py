"""The machine's clock, processors and memory, in bytes throughout.

Each of torchrun's processes on a machine counts its share of the machine's own memory.
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
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory(device: "torch.device") -> int:
    """Return the peak memory so far: the CUDA allocator's, or the process's on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: "torch.device") -> int:
    """Return the memory that is free without pushing anything out: the device's, the machine's or its container's."""
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
    """Return all memory, free or not, of the device, the machine or its container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, _cgroup_limit(CGROUPS), _cgroup_limit(_own_cgroup())) // local_world_size()


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step, instead of giving it back to the system."""
    # Otherwise large tensors are fresh pages in every step, which the system fills at the first touch: up to a tenth of
    # a step on a CPU. Only glibc knows these settings; elsewhere nothing happens.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # nothing outside the heap, where a free gives pages back at once
        mallopt(M_TRIM_THRESHOLD, -1)  # and the heap is never cut


def _own_cgroup() -> Path:
    """Return this process's cgroup (version 2), where a scheduler limits its jobs."""
    # A container sees its own group as the root.
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
        reclaimable = int(statistics.get("inactive_file", 0))  # cached files, which the system gives back on demand
        return _cgroup_limit(folder) - used + reclaimable
    except (OSError, ValueError):  # no such group, or another kind
        return sys.maxsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, CUDA's or the CPU allocator's for a lack of memory."""
    texts = ("out of memory", "can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
