"""Figures of a model's correct and wrong predictions, class by class."""

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from sasa_train.figures import SOLID, WIDTH, fitted, new_figure, set_title
from sasa_train.visualize.val_sample import Prediction

MAX_BARS = 40  # if there are more classes, the worst and the best are shown, half each
MAX_NUMBERS, MAX_NAMES = 20, 40  # maximum number of classes for counts in a confusion matrix, and for class names
MISTAKES_A_ROW = 6
ROOM = 1.9  # in inches, for a class name beside a chart


def draw_class_accuracy(confusion: Tensor, classes: list[str]) -> Figure:
    """Draw top1 per class as bars, worst first, labelled correct / images; if there are many, omit the middle ones."""
    counts = confusion.numpy()
    hits, images = counts.diagonal(), counts.sum(1)
    seen = [label for label in range(len(classes)) if images[label]]
    order = sorted(seen, key=lambda label: (hits[label] / images[label], label))
    shown = order if len(order) <= MAX_BARS else order[: MAX_BARS // 2] + order[-MAX_BARS // 2 :]
    figure, (axis,) = new_figure(1, 1, 1.2 + 0.21 * len(shown), "x")
    color, _, _, _ = SOLID[0]
    for place, label in enumerate(shown):
        top1 = 100 * hits[label] / images[label]
        axis.barh(place, top1, 0.75, color=color, ec="black", lw=0.5)
        numbers = f"{top1:.1f} %   {hits[label]}/{images[label]}"
        axis.text(1.02, place, numbers, va="center", fontsize=7, transform=axis.get_yaxis_transform())
    overall = 100 * hits.sum() / images.sum()
    axis.axvline(overall, color="black", lw=1, ls="--")
    axis.set_yticks(range(len(shown)), [fitted(classes[label], ROOM, 7) for label in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xlabel(f"top1, percent; dashed: all {images.sum():,} images, {overall:.2f}")
    some = f", the worst and best {MAX_BARS // 2} of {len(order)} classes" if len(shown) < len(order) else ""
    set_title(figure, f"top1 by class on val{some}", 10)
    return figure


def draw_confusion(confusion: Tensor, classes: list[str]) -> Figure:
    """Draw labels against predictions as percentages of each label's images, with counts in the cells if they fit.

    The colour scale follows the square root, so that rare confusions stay visible.
    """
    counts = confusion.numpy()
    parts = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, (axis,) = new_figure(1, 1, 7.0)
    shown = axis.imshow(parts, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axis.spines[["top", "right"]].set_visible(True)
    if len(classes) <= MAX_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                ink = "white" if parts[row, column] > 35 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=8)
    if len(classes) <= MAX_NAMES:
        size = 8 if len(classes) <= MAX_NUMBERS else 6
        names = [fitted(name, ROOM, size) for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set_xlabel("prediction" if len(classes) <= MAX_NAMES else "prediction (number of the class)")
    axis.set_ylabel("label" if len(classes) <= MAX_NAMES else "label (number of the class)")
    figure.colorbar(shown, ax=axis, shrink=0.7, label="percent of the label's images (square-root scale)")
    set_title(figure, f"confusion matrix of {counts.sum():,} val images", 10)
    return figure


def draw_mistakes(mistakes: list[Prediction], num_images: int, num_wrong: int) -> Figure:
    """Draw the wrong predictions with the highest probabilities, the most confident first."""
    num_rows = max(1, -(-len(mistakes) // MISTAKES_A_ROW))
    figure, axes = new_figure(num_rows, MISTAKES_A_ROW, 0.4 + 2.1 * num_rows)
    room = WIDTH / MISTAKES_A_ROW - 0.12
    for axis in axes:
        axis.set_axis_off()
    for axis, found in zip(axes, mistakes, strict=False):
        axis.imshow(found.image, interpolation="nearest")
        lines = fitted(f"label {found.label}", room, 7, 2), fitted(f"predicted {found.predicted}", room, 7, 2)
        name = [fitted(found.name, room, 7)] if found.name else []
        axis.set_title("\n".join([*name, *lines, f"{100 * found.probability:.0f} %"]), fontsize=7)
    which = f"the {len(mistakes)} most confident of {num_wrong:,} mistakes" if num_wrong else "no mistakes"
    set_title(figure, f"{which} on {num_images:,} val images")
    return figure
