"""The machine's clock, processors and memory (in bytes).

Each torchrun process on a machine counts only its share of the machine's memory.
"""

import contextlib
import ctypes
import datetime
import functools
import os
import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.processes.ranks import local_world_size

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def usable_processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the processor's name and, on Linux, numbers that tell models apart if a virtual machine hides the name."""
    fields = _processor_fields()
    names = ("cpu family", "model", "CPU implementer", "CPU part")
    numbers = ", ".join(f"{name} {fields[name]}" for name in names if name in fields)
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({numbers})" if numbers else name


def is_amd() -> bool:
    """Return whether the processor is AMD's."""
    return "AuthenticAMD" in (_processor_fields().get("vendor_id") or platform.processor())


@functools.cache
def _processor_fields() -> dict[str, str]:
    """Return what Linux says about the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:  # not on Linux
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def waited_for_processors() -> float:
    """Return for how many seconds the threads of this process have waited for a processor; 0 if this is unknown."""
    seconds = 0.0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):  # of Linux; none elsewhere
        with contextlib.suppress(OSError):  # the thread has ended
            seconds += int(statistics.read_text().split()[1]) / 1e9
    return seconds


def peak_memory(device: "torch.device") -> int:
    """Return the peak memory use so far: that of the CUDA allocator or, on the CPU, that of the whole process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: "torch.device") -> int:
    """Return how much memory of the device, machine or container is available without swapping."""
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
    """Return the total memory of the device, machine or container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, _cgroup_limit(CGROUPS), _cgroup_limit(_own_cgroup())) // local_world_size()


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next step instead of returning it to the system."""
    # Otherwise large tensors get new memory pages in every step, and the system clears each page on first access.
    # On a CPU, this takes up to a tenth of a step. Only glibc has these settings; on other systems, nothing happens.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no mmap, whose pages are returned immediately when freed
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap


def _own_cgroup() -> Path:
    """Return the folder of this process's cgroup (version 2); schedulers use cgroups to limit a job's memory."""
    # A process in a container sees the container's own group as the root.
    try:
        return CGROUPS / Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
    except OSError:
        return CGROUPS


def _cgroup_limit(folder: Path) -> int:
    try:
        return int((folder / "memory.max").read_text())
    except (OSError, ValueError):  # the group does not exist, or the limit is "max"
        return sys.maxsize


def _left_in_cgroup(folder: Path) -> int:
    try:
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = int(statistics.get("inactive_file", 0))  # cached files, which the system frees on demand
        return _cgroup_limit(folder) - used + reclaimable
    except (OSError, ValueError):  # the group does not exist or has another version
        return sys.maxsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of Python, CUDA or the CPU allocator."""
    texts = ("out of memory", "can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
