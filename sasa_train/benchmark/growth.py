"""`sasa-benchmark attention --growth`: how time and memory scale with the map size and the window size.

Maps are square, and the batch size is chosen so that all sizes have about the same number of pixels. All contenders are
timed in turn, forward and backward, and results are per image. Exponents are log-log slopes: 1 means linear.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from sasa_train.benchmark.contenders import YARDSTICK, Case, admitted, new_result, op_memory
from sasa_train.benchmark.timing import fitted_exponent, peak_of, spread, time_in_turn
from sasa_train.terminal import progress_bar

CUDA_IMAGES = 16  # for the largest map; a GPU needs more than one image to be fully used


def measure_growth(options: Namespace, backends: Sequence[str], device: torch.device) -> dict[str, Any]:
    result = new_result("growth")
    num_pixels = max(options.growth_sides) ** 2 * (CUDA_IMAGES if device.type == "cuda" else 1)

    def case(side: int, kernel_size: int) -> Case:
        batch_size = options.batch_size or max(1, round(num_pixels / side**2))
        rest = (batch_size, options.num_heads, kernel_size, options.dtype, device.type)
        return Case(side, side, options.growth_channels, False, *rest)

    over = {
        "map": [case(side, options.kernel_size) for side in options.growth_sides],
        "window": [case(options.growth_side, kernel_size) for kernel_size in options.growth_kernel_sizes],
    }
    with progress_bar(total=len(over) * options.repeats, desc="growth") as bar:
        for axis, cases in over.items():
            # the window of a 3x3 convolution does not grow
            grown = [backend for backend in backends if axis == "map" or backend != YARDSTICK]
            runs = {
                (backend, case): contender.train
                for case in cases
                for backend, contender in admitted(grown, options.backends is not None, result, case).items()
            }
            for (backend, each), seconds in time_in_turn(runs, options.repeats, device, bar).items():
                memory = peak_of(runs[backend, each], device, options.memory, op_memory, backend, each)
                result["rows"].append(_row(axis, backend, each, seconds, memory))
    result["summary"] = fit(result["rows"])
    return result


def _row(axis: str, backend: str, case: Case, seconds: list[float], memory: int | None) -> dict[str, Any]:
    per_image = spread([s / case.batch_size for s in seconds])
    row = {"axis": axis, "backend": backend, "side": case.height, "kernel_size": case.kernel_size}
    row |= {"channels": case.channels, "batch_size": case.batch_size, "seconds_per_image": per_image}
    return row if memory is None else row | {"memory_bytes_per_image": memory / case.batch_size}


def fit(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the fitted exponents as one line per backend and axis."""
    lines = []
    for axis, unit in (("map", "pixels"), ("window", "K")):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            mine = [row for row in rows if (row["axis"], row["backend"]) == (axis, backend)]
            if len(mine) < 2:
                continue
            sizes = [row["side"] ** 2 if axis == "map" else row["kernel_size"] for row in mine]
            times = [row["seconds_per_image"]["median"] for row in mine]
            line = f"{backend}: time ~ {unit}^{fitted_exponent(sizes, times):.2f}"
            memory = [row.get("memory_bytes_per_image", 0) for row in mine]
            lines.append(line + (f", memory ~ {unit}^{fitted_exponent(sizes, memory):.2f}" if all(memory) else ""))
    return lines
