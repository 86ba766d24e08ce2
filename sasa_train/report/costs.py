"""What training had cost a job at each evaluation, by `sasa-report --x`: FLOPs, hours, images or epochs."""

import itertools
import statistics
from collections.abc import Iterable

from sasa_train.report.jobs import Job
from sasa_train.report.rows import Row, figure_of

Point = tuple[float, float]  # cost and val top1, or another figure, in percent
COSTS = {  # what --x names -> heading, and the format of a final cost
    "flops": ("train PFLOPs", "{:.3g}"),
    "hours": ("hours", "{:.3g}"),
    "images": ("images seen", "{:,.0f}"),
    "epochs": ("epochs", "{:.3g}"),
}
PREFIXES = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))


def points(job: Job, row: Row, x: str) -> list[Point]:
    """Return the cost at each of a job's evaluations with its figure; empty if the cost is not known."""
    found = [(cost(job, row, x, val), val[job.figure]) for val in job.val]
    return [(known, reached) for known, reached in found if known is not None]


def cost(job: Job, row: Row, x: str, val: dict) -> float | None:
    """Return what the steps up to a val row had cost: FLOPs, hours without evaluations, images or epochs."""
    if x == "epochs":
        return float(val["epoch"])
    if x == "hours":
        seconds = _seconds(job, val["step"])
        return None if seconds is None else seconds / 3600
    assert job.config is not None
    num_images = float(val["step"] * job.config.trainer.global_batch_size)
    if x == "images":
        return num_images
    per_image = _flops_per_image(job, row)
    return None if per_image is None else num_images * per_image


def _flops_per_image(job: Job, row: Row) -> float | None:
    """Return three times the forward pass's FLOPs or, for a model that cannot be built here, what the run logged."""
    if row.flops is not None:
        return 3.0 * row.flops
    pairs = [(train.get("tflops"), train.get("images_per_sec")) for train in job.train]
    found = [1e12 * tflops / speed for tflops, speed in pairs if tflops and speed]
    return statistics.median(found) if found else None


def _seconds(job: Job, step: int) -> float | None:
    """Return the training time up to a step by the speeds of the train rows, each of which holds since the last."""
    assert job.config is not None
    rows = [train for train in job.train if train.get("images_per_sec")]
    if not rows:  # the run's own total, in proportion
        last = job.val[-1]["step"]
        return None if job.seconds is None else job.seconds * step / last
    total, before = 0.0, 0
    for train in rows:
        end = min(step, train["step"]) if train is not rows[-1] else step
        total += max(0, end - before) * job.config.trainer.global_batch_size / train["images_per_sec"]
        before = max(before, end)
    return total


def final_cost(row: Row, x: str) -> float | None:
    """Return what a row's jobs had cost at their last evaluation, averaged over its seeds."""
    found = [cost(job, row, x, job.val[-1]) for job in row.jobs.values()]
    known = [each for each in found if each is not None]
    return sum(known) / len(known) if known else None


def front(found: Iterable[Point]) -> list[Point]:
    """Return the Pareto front: the points that no other one reaches or exceeds at the same cost or less."""
    best: list[Point] = []
    for _, group in itertools.groupby(sorted(found), key=lambda point: point[0]):
        highest = max(group, key=lambda point: point[1])
        if not best or highest[1] > best[-1][1]:
            best.append(highest)
    return best


def describe_front(rows: list[Row], x: str) -> str:
    """Name the rows, by their numbers, that have a point on the Pareto front, and those whose cost is not known."""
    by_row = {i: [p for job in row.jobs.values() for p in points(job, row, x)] for i, row in enumerate(rows, 1)}
    on_front = set(front(point for found in by_row.values() for point in found))
    rows_on_it = [str(i) for i, found in by_row.items() if on_front.intersection(found)]
    unknown = [str(i) for i, row in enumerate(rows, 1) if row.jobs and not by_row[i]]
    text = f"highest val {figure_of(rows)} at each cost ({x}): row{'s' * (len(rows_on_it) > 1)} {', '.join(rows_on_it)}"
    return (text if rows_on_it else "") + (f"; cost not known: {', '.join(unknown)}" if unknown else "")


def unit_of(x: str, largest: float) -> tuple[float, str]:
    """Return the unit for an axis up to a largest cost, and the axis's label."""
    if x == "flops":
        unit, name = next((pair for pair in PREFIXES if largest >= pair[0]), (1e6, "MFLOPs"))
        return unit, f"{name} of training, forward and backward"
    if x == "hours":
        unit, name = next(
            pair for pair in ((1.0, "hours"), (1 / 60, "minutes"), (1 / 3600, "seconds")) if largest >= 2 * pair[0]
            or pair[1] == "seconds"
        )  # fmt: skip
        return unit, f"{name} of training, without evaluations"
    if x == "images":
        return (1e6, "million images seen") if largest >= 2e6 else (1.0, "images seen")
    return 1.0, "epochs"
