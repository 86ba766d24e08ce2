"""Functions for `sasa-benchmark` that time contenders in turn, compute ratios and measure peak memory in bytes."""

import ctypes
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from sasa_train.machine import peak_memory

SHORTEST_SECONDS = 0.02  # minimum duration of a measurement; shorter calls are repeated and the time is divided
MAX_CALLS = 1000
NUM_WARM_UPS = 2

Run = Callable[[], object]
Key = TypeVar("Key")


def time_in_turn(
    contenders: Mapping[Key, Run], repeats: int, device: torch.device, bar: tqdm, num_warm_ups: int = NUM_WARM_UPS
) -> dict[Key, list[float]]:
    """Return the seconds per call for each contender, one value per repetition.

    After a warm-up, each repetition times all contenders in alternating order, so that any disturbance on the machine
    affects all of them equally.
    """
    for _ in range(num_warm_ups):
        for run in contenders.values():
            run()
    num_calls = {name: _num_calls(run, device) for name, run in contenders.items()}
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    for repetition in range(repeats):
        for name in list(contenders)[:: -1 if repetition % 2 else 1]:
            seconds[name].append(time_calls(contenders[name], num_calls[name], device))
        bar.update()
    return seconds


def _num_calls(run: Run, device: torch.device) -> int:
    run()
    return min(MAX_CALLS, math.ceil(SHORTEST_SECONDS / max(time_calls(run, 1, device), 1e-9)))


def time_calls(run: Run, num_calls: int, device: torch.device) -> float:
    """Return the seconds per call; on CUDA, the time is measured between two events in the stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(num_calls):
            run()
        return (time.perf_counter() - start) / num_calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(num_calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / num_calls


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Return the median and quartiles of the ratios of two contenders' values, one ratio per repetition."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]}


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit e in `values` ~ `sizes`**e as the slope of a line through the logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def extra_memory(run: Run, device: torch.device) -> int:
    """Return the peak memory of a call minus the memory before it, in bytes.

    CUDA values come from the allocator. CPU values are based on the resident set, which includes the libraries' own
    memory; the process must be fresh, because memory freed earlier is reused without being counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _forget_peak(device)
    run()
    return _peak_resident(device) - before


def _forget_peak(device: torch.device) -> int:
    """Reset the peak to the resident memory (Linux only); return the baseline to subtract from later peaks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)  # memory kept by the C library would be reused without being counted
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_memory(device)
    return _peak_resident(device)


def _peak_resident(device: torch.device) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_memory(device)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_fresh_process(function: Callable[..., int], *arguments: object) -> int:
    """Call `function` in a new process that has run nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_of(
    run: Run, device: torch.device, is_wanted: bool, in_fresh: Callable[..., int], *arguments: object
) -> int | None:
    """Return the peak extra memory of `run` on CUDA, or of `in_fresh(*arguments, threads)` on a CPU if `is_wanted`."""
    if device.type == "cuda":
        return extra_memory(run, device)
    return in_fresh_process(in_fresh, *arguments, torch.get_num_threads()) if is_wanted else None
