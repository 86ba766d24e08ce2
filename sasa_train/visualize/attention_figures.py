"""Figures of attention: maps over images, attention distances and relative embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from sasa_train.figures import (
    MAGNITUDES,
    SIGNED,
    SOLID,
    WIDTH,
    as_logarithmic,
    fitted,
    legend_below,
    new_figure,
    set_title,
)
from sasa_train.visualize.geometry import Distances, Window
from sasa_train.visualize.val_sample import Prediction

MIN_CELL = 1.25  # in inches; if the cells do not fit side by side, the figure becomes wider
WEIGHTS = "plasma"  # lightness increases uniformly, as in MAGNITUDES, but no colour is a grey
OPAQUE, RISE = 0.9, 0.6  # opacity of the largest weight, and the power with which smaller ones follow
FAINT = 0.3  # of the range of greys, at each end, that the image leaves to the weights
SMALL_WINDOW = 0.2  # as a fraction of the image size; smaller windows are also shown enlarged
DOT: dict[str, Any] = {"marker": "o", "mfc": "white", "mec": "black", "mew": 0.8, "ms": 4, "ls": ""}
OUTLINE = [withStroke(linewidth=2.2, foreground="white")]  # keeps black lines visible on dark images


@dataclass
class View:
    """A query in an image: its pixel (row, column) and the window around it in each layer."""

    prediction: Prediction
    pixel: tuple[int, int]
    windows: dict[str, Window]


def draw_attention_maps(views: list[View]) -> Figure:
    """Draw one row per query and one column per layer, showing the window to scale, with the heads' mean weights."""
    layers = list(views[0].windows)
    figure, cells = _grid(len(views), 1 + len(layers))
    means = [{name: window.weights.mean(0).numpy() for name, window in view.windows.items()} for view in views]
    for row, (view, maps) in enumerate(zip(views, means, strict=True)):
        _show_query(cells[row][0], view)
        cells[row][0].set_ylabel(_describe(view, _room(figure, cells)), fontsize=7)
        for axis, name in zip(cells[row][1:], layers, strict=True):
            largest = max(other[name].max() for other in means)
            shown = _show_weights(axis, view, view.windows[name], maps[name], largest)
            if row == len(views) - 1:
                _color_bar(figure, shown, [line[layers.index(name) + 1] for line in cells], "bottom")
    cells[0][0].set_title("image, query", fontsize=8)
    for axis, name in zip(cells[0][1:], layers, strict=True):
        axis.set_title(_layer_title(name, views[0].windows[name]), fontsize=8)
    windows = [(view, window) for view in views for window in view.windows.values()]
    enlarged = ", enlarged in a corner if small" if any(_is_small(*pair) for pair in windows) else ""
    set_title(
        figure,
        "attention weights of one pixel (dot), mean over heads; outlined: the pixel's position in the map, and its "
        f"window{enlarged}",
    )
    return figure


def draw_attention_heads(view: View, heads: Sequence[int] | None = None) -> Figure:
    """Draw one query with one row per layer and one column per head; `heads=None` selects all heads."""
    chosen = {
        name: [head for head in range(len(window.weights)) if heads is None or head in heads]
        for name, window in view.windows.items()
    }
    figure, cells = _grid(len(view.windows), 1 + max(len(found) for found in chosen.values()))
    for line, (name, window) in zip(cells, view.windows.items(), strict=True):
        _show_query(line[0], view, window)
        line[0].set_ylabel(_layer_title(name, window), fontsize=7)
        shown = None
        for axis, head in zip(line[1:], chosen[name], strict=False):
            largest = window.weights[chosen[name]].max().item()
            shown = _show_weights(axis, view, window, window.weights[head].numpy(), largest)
            axis.set_title(f"head {head}", fontsize=8)
        for axis in line[1 + len(chosen[name]) :]:
            axis.set_visible(False)
        if shown is not None:
            _color_bar(figure, shown, line, "right")
    found = view.prediction
    label = "" if found.label is None else f"label {found.label}, "
    predicted = f"predicted {found.predicted} ({100 * found.probability:.0f} %)"
    name = f"{found.name}, " if found.name else ""
    set_title(figure, f"attention weights by head; {name}{label}{predicted}, {_place(view.pixel)}")
    return figure


def draw_distances(layers: list[Distances], num_images: int) -> Figure:
    """Draw the mean attention distance by layer and head, in pixels and relative to that of uniform attention.

    A layer whose queries have a single key, as on a 1x1 map, is listed on the axis but has no points.
    """
    figure, (in_pixels, in_parts) = new_figure(1, 2, 3.8, "both")
    names = [layer.layer if layer.uniform else f"{layer.layer} (one key)" for layer in layers]
    places = [at for at, layer in enumerate(layers) if layer.uniform]
    (color, _, marker, _), (mean_color, _, mean_marker, mean_line) = SOLID[0], SOLID[2]
    for axis, unit in ((in_pixels, [1.0] * len(layers)), (in_parts, [layer.uniform for layer in layers])):
        points = [(at, head / unit[at]) for at in places for head in layers[at].heads]
        means = [float(np.mean(layers[at].heads)) / unit[at] for at in places]
        axis.plot([at for at, _ in points], [head for _, head in points], ls="", marker=marker, color=color,
                  mec="black", mew=0.4, ms=5, alpha=0.7, label="a head")  # fmt: skip
        axis.plot(places, means, color=mean_color, marker=mean_marker, ms=4, lw=1, ls=mean_line, label="mean of heads")
        axis.plot(places, [layers[at].uniform / unit[at] for at in places], color="#777777", lw=1.2, ls="--",
                  label="uniform attention")  # fmt: skip
        axis.set_xticks(range(len(layers)), names, rotation=90, fontsize=7)
    if places:  # a logarithmic axis fails without points
        as_logarithmic(in_pixels, (1, 1.5, 2, 3, 5, 7))
    in_pixels.set_ylabel("mean attention distance, input pixels", fontsize=9)
    in_parts.set_ylabel("relative to uniform attention", fontsize=9)
    in_parts.set_ylim(0, 1.1 * max([1.0, *(head / layers[at].uniform for at in places for head in layers[at].heads)]))
    legend_below(figure, in_pixels, 3)
    set_title(figure, f"how far attention reaches, {num_images:,} val images", 10)
    return figure


def draw_relative_embeddings(norms: dict[str, Tensor], scores: dict[str, Tensor], num_images: int) -> Figure:
    """Draw K x K maps per layer: the norm of r and, for each head, q.r averaged over images and centred.

    norms: [K, K]; scores: [N, K, K]. Centring subtracts the mean over the window; this does not change the softmax.
    """
    figure, cells = _grid(len(scores), 1 + max(len(found) for found in scores.values()))
    for line, (name, by_head) in zip(cells, scores.items(), strict=True):
        norm, centred = norms[name].numpy(), (by_head - by_head.mean((1, 2), keepdim=True)).numpy()
        _show_offsets(line[0], norm, float(norm.min()), float(norm.max()), MAGNITUDES)
        line[0].set_xlabel(f"{norm.min():.2g} to {norm.max():.2g}", fontsize=7)
        line[0].set_ylabel(name, fontsize=7)
        largest = float(np.abs(centred).max()) or 1.0  # 0 if there is only one position
        for axis, values in zip(line[1:], centred, strict=False):
            shown = _show_offsets(axis, values, -largest, largest, SIGNED)
        for axis in line[1 + len(centred) :]:
            axis.set_visible(False)
        _color_bar(figure, shown, line, "right")
    cells[0][0].set_title("norm of r", fontsize=8)
    for head, axis in enumerate(cells[0][1:]):
        axis.set_title(f"q·r, head {head}", fontsize=8)
    where = "relative embeddings by key offset (dot: the query's place)"
    set_title(figure, f"{where}; q·r: mean over {num_images:,} images, centred")
    return figure


def _grid(num_rows: int, num_columns: int) -> tuple[Figure, list[list[Axes]]]:
    width = max(WIDTH, MIN_CELL * num_columns)
    figure, axes = new_figure(num_rows, num_columns, 0.8 + num_rows * width / (num_columns + 0.6))
    figure.set_figwidth(width)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return figure, [axes[start : start + num_columns] for start in range(0, len(axes), num_columns)]


def _show_query(axis: Axes, view: View, window: Window | None = None) -> None:
    image = view.prediction.image
    axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="nearest")
    _mark(axis, view, window)


def _show_weights(axis: Axes, view: View, window: Window, weights: np.ndarray, largest: float) -> AxesImage:
    """Show the weights over the grey image, which shows where there is none; a small window is also shown enlarged."""
    image = view.prediction.image
    shown = _overlay(axis, image, window, weights, largest)
    is_small = _is_small(view, window)
    _mark(axis, view, window, with_dot=not is_small)
    _outline_query(axis, window)
    if is_small:
        row, column = view.pixel
        corner = (0.57 if column < image.shape[1] / 2 else 0.02, 0.02 if row < image.shape[0] / 2 else 0.57)
        inset = axis.inset_axes((*corner, 0.41, 0.41), xticks=[], yticks=[])
        _overlay(inset, image, window, weights, largest)
        left, top, right, bottom = window.box
        inset.set_xlim(left, right)
        inset.set_ylim(bottom, top)
        inset.spines[:].set_path_effects(OUTLINE)
        _outline_query(inset, window)
        _dot(inset, window)
    if (outside := 1 - float(weights.sum())) > 0.005:  # border=zero: keys outside the image also receive weight
        axis.set_xlabel(f"{100 * outside:.0f} % outside", fontsize=7)
    return shown


def _overlay(axis: Axes, image: np.ndarray, window: Window, weights: np.ndarray, largest: float) -> AxesImage:
    grey = image @ np.array([0.299, 0.587, 0.114])
    whole = (0, image.shape[1], image.shape[0], 0)
    axis.imshow(grey, cmap="gray", vmin=-255 * FAINT, vmax=255 * (1 + FAINT), extent=whole, interpolation="nearest")
    left, top, right, bottom = window.box
    box = (left, right, bottom, top)
    return axis.imshow(weights, extent=box, cmap=_weight_colors(), vmin=0, vmax=largest, interpolation="nearest")


def _weight_colors() -> ListedColormap:
    """Return colours of which 0 is transparent and the largest weight opaque."""
    colors = colormaps[WEIGHTS](np.linspace(0, 1, 256))
    colors[:, 3] = OPAQUE * np.linspace(0, 1, 256) ** RISE
    return ListedColormap(colors)


def _is_small(view: View, window: Window) -> bool:
    left, _, right, _ = window.box
    return right - left < view.prediction.image.shape[1] * SMALL_WINDOW


def _outline_query(axis: Axes, window: Window) -> None:
    """Outline the query's position, from which the window is laid; the pixel may lie anywhere in it."""
    left, top, right, bottom = window.query_box
    square = Rectangle((left, top), right - left, bottom - top, fill=False, ec="black", lw=0.7, path_effects=OUTLINE)
    axis.add_patch(square)


def _mark(axis: Axes, view: View, window: Window | None, with_dot: bool = True) -> None:
    if window is not None:
        left, top, right, bottom = window.box
        right, bottom = min(right, view.prediction.image.shape[1]), min(bottom, view.prediction.image.shape[0])
        axis.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, ec="black", lw=1, path_effects=OUTLINE)
        )
    if with_dot:
        row, column = view.pixel
        axis.plot(column + 0.5, row + 0.5, **DOT)
    axis.set_xlim(0, view.prediction.image.shape[1])
    axis.set_ylim(view.prediction.image.shape[0], 0)


def _dot(axis: Axes, window: Window) -> None:
    """Draw a dot at the centre of the query's position."""
    left, top, right, bottom = window.query_box
    axis.plot((left + right) / 2, (top + bottom) / 2, **DOT)


def _describe(view: View, room: float) -> str:
    """Describe a query in lines of at most `room` inches."""
    found = view.prediction
    label = [] if found.label is None else [fitted(f"label {found.label}", room, 7, 2)]
    predicted = [f"predicted {100 * found.probability:.0f} %:", fitted(found.predicted, room, 7, 2)]
    name = [fitted(found.name, room, 7)] if found.name else []
    return "\n".join([*name, *label, *predicted, _place(view.pixel)])


def _place(pixel: tuple[int, int]) -> str:
    return f"row {pixel[0]}, column {pixel[1]}"


def _room(figure: Figure, cells: list[list[Axes]]) -> float:
    """Return the height in inches that a description beside a row of cells may take."""
    return (figure.get_figheight() - 0.9) / len(cells) - 0.1


def _layer_title(name: str, window: Window) -> str:
    return f"{name}\n{window.reduction} px per position"


def _show_offsets(axis: Axes, values: np.ndarray, low: float, high: float, colors: str) -> AxesImage:
    below, right = values.shape[0] / 2, values.shape[1] / 2
    shown = axis.imshow(values, cmap=colors, vmin=low, vmax=high, extent=(-right, right, below, -below))
    axis.plot(0, 0, **DOT)
    return shown


def _color_bar(figure: Figure, shown: AxesImage, axes: list[Axes], side: str) -> None:
    bar = figure.colorbar(shown, ax=axes, location=side, fraction=0.06, pad=0.02, aspect=15)
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_facecolor("0.5")  # a mean grey, as of the image below transparent weights
    low, high = shown.get_clim()
    bar.set_ticks([low, (low + high) / 2, high], labels=[f"{v:.2g}" for v in (low, (low + high) / 2, high)])
