"""The charts of `sasa-benchmark --plot`, in one style that is readable in greyscale and by colour-blind readers."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sasa_train.figures import DPI, GRID, STYLES, new_figure, set_title

BAR: dict[str, Any] = {"edgecolor": "black", "lw": 0.6, "error_kw": {"lw": 1, "capsize": 2, "ecolor": "black"}}
NAMES = ("conv", "cpu", "triton", "attention", "flex", "halo", "reference", "natten")


def draw_chart(result: dict[str, Any], title: str, path: Path) -> None:
    """Draw the chart for this kind of result and write it as a PNG file."""
    rows = result["rows"]
    draw = {"model": _draw_models, "growth": _draw_growth}.get(result["kind"], _draw_shapes)
    figure = draw(rows)
    set_title(figure, title, 10)
    figure.savefig(path, dpi=DPI, format="png")


def _style(names: list[str]) -> dict[str, tuple]:
    ordered = sorted(names, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))
    offset = 0 if "conv" in ordered else 1  # grey is reserved for the convolution
    return {name: STYLES[(i + offset) % len(STYLES)] for i, name in enumerate(ordered)}


def _draw_shapes(rows: list[dict[str, Any]]) -> Figure:
    """Draw bars per shape: ratios to the convolution with quartiles or, if it is missing, times in ms with ranges."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    is_ratio = all("forward_backward_ratio" in row for row in rows)
    shown = [row for row in rows if not (is_ratio and row["backend"] == "conv")] or rows
    names = list(dict.fromkeys(row["backend"] for row in shown))
    styles = _style(list(dict.fromkeys(row["backend"] for row in rows)))
    figure, (axis,) = new_figure(1, 1, 4.2)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in shown if row["backend"] == name]
        places = [shapes.index(row["shape"]) + (i - (len(names) - 1) / 2) * width for row in mine]
        middles, *errors = zip(*(_with_errors(row, is_ratio) for row in mine), strict=True)
        color, hatch, *_ = styles[name]
        axis.bar(places, middles, width * 0.92, yerr=errors, color=color, hatch=hatch, label=name, **BAR)
    if is_ratio:
        axis.axhline(1, color="black", lw=1.2, ls="--", label="3x3 convolution")
    axis.set_ylabel("time / 3x3 convolution's, forward + backward" if is_ratio else "ms, forward + backward")
    axis.set_xticks(range(len(shapes)), shapes, rotation=35, ha="right", fontsize=8)
    axis.set_xlabel("height x width x channels (/2: a stage begins)" if any("/2" in s for s in shapes) else
                    "height x width x channels")  # fmt: skip
    axis.grid(axis="y", color=GRID, lw=0.6)
    axis.legend(frameon=False, fontsize=8, ncols=len(names) + 1, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _with_errors(row: dict[str, Any], is_ratio: bool) -> tuple[float, float, float]:
    """Return the median and the lengths of the error bar below and above it."""
    found = row["forward_backward_ratio" if is_ratio else "forward_backward_seconds"]
    low, high = found["quartiles"] if is_ratio else (found["min"], found["max"])
    unit, middle = 1 if is_ratio else 1e3, found["median"]
    return unit * middle, unit * (middle - low), unit * (high - middle)


def _draw_growth(rows: list[dict[str, Any]]) -> Figure:
    """Draw the time per image, and memory if measured, against the number of pixels (log scale) and the window size."""
    quantities = [("seconds_per_image", "ms per image, forward + backward", 1e3)]
    if all("memory_bytes_per_image" in row for row in rows):
        quantities.append(("memory_bytes_per_image", "MiB per image at the peak", 2**-20))
    panels = [(axis, *quantity) for quantity in quantities for axis in ("map", "window")]
    styles = _style(list(dict.fromkeys(row["backend"] for row in rows)))
    figure, axes = new_figure(len(quantities), 2, 0.4 + 3.3 * len(quantities))
    for panel, (axis_name, key, label, unit) in zip(axes, panels, strict=True):
        by_map = axis_name == "map"
        size = "side" if by_map else "kernel_size"
        mine = [row for row in rows if row["axis"] == axis_name]
        for name, (color, _, marker, line) in styles.items():
            points = sorted(
                (row[size] ** 2, (row[key]["median"] if isinstance(row[key], dict) else row[key]) * unit)
                for row in mine
                if row["backend"] == name
            )
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, color=color, marker=marker, ls=line, mec="black", mew=0.5, label=name)
        if by_map:
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
        else:
            panel.set_ylim(bottom=0)
        sizes = sorted({row[size] for row in mine})
        panel.set_xticks([n**2 for n in sizes], [f"{n}²" for n in sizes])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("pixels" if by_map else "positions in the window, K²")
        panel.set_ylabel(label)
        panel.grid(color=GRID, lw=0.6, which="both")
        panel.legend(frameon=False, fontsize=8)
    return figure


def _draw_models(rows: list[dict[str, Any]]) -> Figure:
    """Draw images/s as bars with ranges, with training next to inference."""
    figure, axes = new_figure(1, 2, 1.6 + 0.45 * len(rows))
    for axis, what in zip(axes, ("training", "inference"), strict=True):
        for i, row in enumerate(rows):
            found, (color, hatch, *_) = row[f"{what}_images_per_sec"], STYLES[i % len(STYLES)]
            error = [[found["median"] - found["min"]], [found["max"] - found["median"]]]
            axis.barh(i, found["median"], 0.7, xerr=error, color=color, hatch=hatch, **BAR)
            text = f"{found['median']:.{max(0, 2 - int(math.log10(max(found['median'], 1))))}f}"
            axis.annotate(text, (found["max"], i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.margins(x=0.18)
        axis.locator_params(axis="x", nbins=4)
        axis.set_xlabel(f"{what}, images/s")
        axis.grid(axis="x", color=GRID, lw=0.6)
        axis.set_yticks(range(len(rows)), [row["model"].replace(",", "\n") for row in rows], fontsize=8)
        axis.invert_yaxis()
    axes[1].tick_params(labelleft=False)
    return figure
