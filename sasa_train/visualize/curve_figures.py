"""Figures of training progress: loss, top1 and learning rate."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_train.figures import (
    SOLID,
    as_epochs,
    as_logarithmic,
    as_percent,
    legend_below,
    legend_label,
    new_figure,
    set_title,
)
from sasa_train.refusal import ConfigError
from sasa_train.visualize.names import FIGURES, OF_SEVERAL

Rows = list[dict[str, Any]]  # the rows of metrics.jsonl
Drawn = tuple[str, Figure, str]  # name, figure and one-sentence caption
MAX_RUNS = 10  # two line types for each of the five styles
TRAIN_COLOR = "#555555"
OF_LR = "The highest rate of any parameter. Loss and top1 wobble while it is high and settle as it falls."
OF_TRAINING = (
    "Both losses should fall. If val loss rises while train loss falls, the model memorises its train images. Train "
    "top1 is measured on augmented images, so it may lie below val."
)
OUTLIER = 10  # times the median: a larger loss makes the axis logarithmic
LINES = ("-", "--", "-.")


def draw_curves(runs: dict[str, Rows], names: Sequence[str] = OF_SEVERAL) -> Iterator[Drawn]:
    """Draw the figures in `names` that the logs have rows for; `runs` maps the name of each run to its rows.

    Raises:
        ConfigError: there are too many runs to tell apart.
    """
    if len(runs) > MAX_RUNS:
        raise ConfigError(
            f"{len(runs)} runs: the curves of more than {MAX_RUNS} cannot be told apart; sasa-report compares sweeps"
        )
    for name, draw, caption in (
        ("training_curves", draw_training_curves, OF_TRAINING),
        ("lr_schedule", draw_lr_schedule, OF_LR),
    ):
        if name in names and name not in too_short(runs):
            yield name, draw(runs), caption if len(runs) == 1 else f"{FIGURES[name]}, {len(runs)} runs. {caption}"


def too_short(runs: dict[str, Rows]) -> dict[str, str]:
    """Return a dict that maps each figure for which no run has logged two points to the reason."""
    of_val, of_train, of_lr = (
        max(sum(y is not None and math.isfinite(y) for y in _series(rows, split, key)[1]) for rows in runs.values())
        for split, key in (("val", "top1"), ("train", "top1"), ("train", "lr"))
    )
    reasons = {}
    if max(of_val, of_train) < 2:
        reasons["training_curves"] = f"a curve takes two rows, and the log has {of_train} of train and {of_val} of val"
    if of_lr < 2:
        reasons["lr_schedule"] = f"a curve takes two rows, and the log has {of_lr} with a learning rate"
    return reasons


def draw_training_curves(runs: dict[str, Rows]) -> Figure:
    """Draw loss and top1 by epoch for one or more runs: strong lines for val, faint lines for train."""
    labels = {"loss": "loss", "top1": "top1, percent"}
    keys = [key for key in labels if key == "top1" or _has_loss(runs)]
    figure, axes = new_figure(1, len(keys), 3.6 + 0.2 * math.ceil(len(runs) / 2), "both")
    for (name, rows), (color, style) in zip(runs.items(), _styles(), strict=False):
        for axis, key in zip(axes, keys, strict=True):
            train_color, train_label = (TRAIN_COLOR, "train") if len(runs) == 1 else (color, None)
            axis.plot(*_series(rows, "train", key), color=train_color, lw=1.2, ls=":", label=train_label)
            _plot(axis, rows, "val", key, style, 10, "val" if len(runs) == 1 else legend_label(name))
            axis.set_ylabel(labels[key])
    as_percent(axes[-1])
    is_log = "loss" in keys and _has_outlier(runs)
    if is_log:
        as_logarithmic(axes[0])
    _finish(figure, axes, runs)
    scale = " (logarithmic)" if is_log else ""
    names = " and ".join(key + scale * (key == "loss") for key in keys)
    set_title(figure, f"{names}; dotted: on train, with its augmentation and regularisation")
    return figure


def draw_lr_schedule(runs: dict[str, Rows]) -> Figure:
    """Draw the logged learning rate, which is the maximum over the parameter groups."""
    figure, (axis,) = new_figure(1, 1, 3.2 + 0.2 * math.ceil(len(runs) / 2), "both")
    for (name, rows), (_, style) in zip(runs.items(), _styles(), strict=False):
        _plot(axis, rows, "train", "lr", style, 20, legend_label(name))
    axis.set_ylabel("learning rate")
    axis.set_ylim(bottom=0)
    _finish(figure, [axis], runs, has_legend=len(runs) > 1)
    set_title(figure, "learning rate, as logged")
    return figure


def _has_loss(runs: dict[str, Rows]) -> bool:
    """Whether any loss was finite: a run that diverged at once has none to draw."""
    return any(
        math.isfinite(y) for rows in runs.values() for part in ("train", "val") for y in _series(rows, part, "loss")[1]
    )


def _has_outlier(runs: dict[str, Rows]) -> bool:
    """Whether one loss would flatten the rest of its curve, and all of them have a logarithm."""
    losses = [y for rows in runs.values() for part in ("train", "val") for y in _series(rows, part, "loss")[1]]
    losses = [y for y in losses if math.isfinite(y)]
    return min(losses) > 0 and max(losses) > OUTLIER * statistics.median(losses)


def _styles() -> list[tuple[str, dict[str, Any]]]:
    """Return each run's colour and line style; runs 6 to 10 reuse colours in another style. Dotted lines show train."""
    return [
        (color, {"color": color, "marker": marker, "ls": LINES[(i + shift) % len(LINES)]})
        for shift, (i, (color, _, marker, _)) in itertools.product((0, 1), enumerate(SOLID))
    ]


def _plot(axis: Axes, rows: Rows, split: str, key: str, style: dict[str, Any], num_marks: int, label: str) -> None:
    x, y = _series(rows, split, key)
    axis.plot(x, y, lw=1.4, ms=4, mec="black", mew=0.4, markevery=max(1, len(x) // num_marks), label=label, **style)


def _series(rows: Rows, split: str, key: str) -> tuple[list[float], list[float]]:
    """Return the epochs, computed from steps, and the values; a value that was not finite leaves a gap."""
    per_epoch = steps_per_epoch(rows)
    found = [(row["step"] / per_epoch, row.get(key)) for row in rows if row["split"] == split]
    return [x for x, _ in found], [math.nan if y is None else y for _, y in found]


def steps_per_epoch(rows: Rows) -> float:
    """Return the steps per epoch, derived from the first evaluation, or 1 if there has been no evaluation."""
    first = next((row for row in rows if row["split"] == "val" and row["epoch"]), None)
    return 1.0 if first is None else first["step"] / first["epoch"]


def _finish(figure: Figure, axes: list[Axes], runs: dict[str, Rows], has_legend: bool = True) -> None:
    has_epochs = all(any(row["split"] == "val" for row in rows) for rows in runs.values())
    for axis in axes:
        axis.set_xlabel("epoch" if has_epochs else "step")
        as_epochs(axis.xaxis)
    if has_legend:
        legend_below(figure, axes[0])
