"""The reliability diagram, which plots accuracy against confidence and the number of images per bin."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from sasa_train.evaluate.calibration import Bin, expected_error
from sasa_train.figures import GRID, STYLES, set_title

ACCURACY, GAP = STYLES[1], STYLES[2]
OUTLINE: dict[str, Any] = {"edgecolor": "black", "lw": 0.6}
SIDE, COUNTS_SHARE = 5.6, 3.0  # width in inches; height of the diagram relative to the counts below it


def draw_reliability(bins: Sequence[Bin], title: str) -> Figure:
    """Draw each bin's accuracy and its gap to the mean confidence, with the number of images per bin below."""
    figure = Figure(figsize=(SIDE, SIDE * 1.25), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(COUNTS_SHARE, 1))
    _draw_accuracy(upper, bins)
    _draw_counts(lower, bins)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=GRID, lw=0.6)
    set_title(figure, f"{title}; ECE {expected_error(bins):.2f} %", 10)
    return figure


def _draw_accuracy(axis: Axes, bins: Sequence[Bin]) -> None:
    filled = [each for each in bins if each.num_images]
    places, width = [(each.low + each.high) / 2 for each in filled], 100 / len(bins)
    accuracies, gaps = [each.top1 or 0.0 for each in filled], [each.gap for each in filled]
    color, hatch, *_ = ACCURACY
    axis.bar(places, accuracies, width, color=color, hatch=hatch, label="accuracy", **OUTLINE)
    color, hatch, *_ = GAP
    label = "gap to the mean confidence"
    axis.bar(places, gaps, 0.7 * width, bottom=accuracies, color=color, hatch=hatch, label=label, **OUTLINE)
    outline = [Stroke(linewidth=3.5, foreground="white"), Normal()]  # keeps the line visible on dark bars
    axis.plot([0, 100], [0, 100], color="black", lw=1.3, label="as confident as accurate", path_effects=outline)
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.set_ylabel("top1, percent")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1.2)


def _draw_counts(axis: Axes, bins: Sequence[Bin]) -> None:
    places, width = [(each.low + each.high) / 2 for each in bins], 100 / len(bins)
    counts = [each.num_images for each in bins]
    bars = axis.bar(places, counts, width, color=STYLES[0][0], **OUTLINE)
    if len(bins) <= 20:
        axis.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=6)
    axis.margins(y=0.2)
    axis.set_ylabel("images")
    axis.set_xlabel("confidence of the prediction, percent")
