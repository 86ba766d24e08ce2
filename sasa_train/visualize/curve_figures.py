"""Figures of how runs went: loss and top1, learning rate."""

import itertools
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sasa_train.figures import GRID, SOLID, as_label, new_figure
from sasa_train.refusal import ConfigError

Rows = list[dict[str, Any]]  # of metrics.jsonl
MAX_RUNS = 10  # two ways to draw each of the five styles' lines
TRAIN_COLOR = "#555555"
LINES = ("-", "--", "-.")


def draw_training_curves(runs: dict[str, Rows]) -> Figure:
    """Loss and top1 over epochs, of one run or several by name: val as a strong line, train as a faint one.

    Raises:
        ConfigError: more runs than can be told apart.
    """
    _check_count(runs)
    figure, (of_loss, of_top1) = new_figure(1, 2, 3.6 + _legend_height(runs))
    for (name, rows), (color, marker, line) in zip(runs.items(), _styles(), strict=False):
        for axis, key in ((of_loss, "loss"), (of_top1, "top1")):
            train_color, train_label = (TRAIN_COLOR, "train") if len(runs) == 1 else (color, None)
            axis.plot(*_series(rows, "train", key), color=train_color, lw=1.2, ls=":", label=train_label)
            x, y = _series(rows, "val", key)
            label = "val" if len(runs) == 1 else as_label(name)
            axis.plot(x, y, color=color, ls=line, lw=1.4, marker=marker, ms=4, mec="black", mew=0.4,
                      markevery=max(1, len(x) // 10), label=label)  # fmt: skip
    of_loss.set_ylabel("loss")
    of_top1.set_ylabel("top1, percent")
    _finish(figure, [of_loss, of_top1], runs)
    figure.suptitle("loss and top1; dotted: on train, with its augmentation and regularisation", fontsize=9)
    return figure


def draw_lr_schedule(runs: dict[str, Rows]) -> Figure:
    """The learning rate as it was logged, the highest of the parameter groups.

    Raises:
        ConfigError: more runs than can be told apart.
    """
    _check_count(runs)
    figure, (axis,) = new_figure(1, 1, 3.2 + _legend_height(runs))
    for (name, rows), (color, marker, line) in zip(runs.items(), _styles(), strict=False):
        x, y = _series(rows, "train", "lr")
        axis.plot(x, y, color=color, ls=line, lw=1.4, marker=marker, ms=4, mec="black", mew=0.4,
                  markevery=max(1, len(x) // 20), label=as_label(name))  # fmt: skip
    axis.set_ylabel("learning rate")
    axis.set_ylim(bottom=0)
    _finish(figure, [axis], runs if len(runs) > 1 else {})
    figure.suptitle("learning rate, as logged", fontsize=9)
    return figure


def _check_count(runs: dict[str, Rows]) -> None:
    if len(runs) > MAX_RUNS:
        raise ConfigError(
            f"{len(runs)} runs: the curves of more than {MAX_RUNS} cannot be told apart; sasa-report compares sweeps"
        )


def _styles() -> list[tuple[str, str, str]]:
    """Colour, marker and line of each run: the second five have other lines. Dotted ones are train's."""
    return [
        (color, marker, LINES[(i + shift) % len(LINES)])
        for shift, (i, (color, _, marker, _)) in itertools.product((0, 1), enumerate(SOLID))
    ]


def _series(rows: Rows, split: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs, from steps, and values; what was not finite leaves a gap."""
    per_epoch = steps_per_epoch(rows)
    found = [(row["step"] / per_epoch, row.get(key)) for row in rows if row["split"] == split]
    return [x for x, _ in found], [math.nan if y is None else y for _, y in found]


def steps_per_epoch(rows: Rows) -> float:
    """By the first evaluation, which an epoch's end brings; 1, and so steps themselves, before there was one."""
    first = next((row for row in rows if row["split"] == "val" and row["epoch"]), None)
    return 1.0 if first is None else first["step"] / first["epoch"]


def _legend_height(runs: dict[str, Rows]) -> float:
    return 0.2 * math.ceil(len(runs) / 2)


def _finish(figure: Figure, axes: list[Axes], runs: dict[str, Rows]) -> None:
    has_epochs = all(any(row["split"] == "val" for row in rows) for rows in runs.values())
    for axis in axes:
        axis.set_xlabel("epoch" if has_epochs else "step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color=GRID, lw=0.6)
    if runs:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
