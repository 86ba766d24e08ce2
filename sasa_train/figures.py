"""The common style of all charts, which keeps them readable in greyscale and for colour-blind people."""

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_train.terminal import printable

# Colours of Okabe and Ito that also differ in greyscale, each with its own hatch and marker.
STYLES = (
    ("#B8B8B8", "", "o", "-"),
    ("#0072B2", "", "s", "-"),
    ("#E69F00", "///", "^", "--"),
    ("#111111", "", "D", ":"),
    ("#56B4E9", "...", "v", "-."),
    ("#F0E442", "xx", "P", "--"),
)
SOLID = STYLES[1:]  # without the grey, which has too little contrast for points and lines
MAGNITUDES = "cividis"  # a colour map whose lightness increases uniformly, also for colour-blind people
GRID = "#DDDDDD"
WIDTH, DPI = 8.0, 150


def new_figure(num_rows: int, num_columns: int, height: float, grid: str = "") -> tuple[Figure, list[Axes]]:
    """Return a figure of WIDTH x `height` inches and its axes in row-major order; `grid` is "", "x", "y" or "both"."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        if grid:
            axis.grid(axis=grid, color=GRID, lw=0.6)
    return figure, axes


def legend_below(figure: Figure, axis: Axes, num_columns: int = 2) -> None:
    """Add a single legend, with the labels of `axis`, below the axes of the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False, fontsize=8)


def as_label(name: str) -> str:
    """Return a file or class name, escaped so that matplotlib shows it unchanged."""
    # A dollar sign starts a formula, and a leading underscore excludes a name from legends.
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def rendered(figure: Figure, kind: str = "png") -> bytes:
    """Render a figure as PNG, SVG or PDF, without a date or random ids, so that the file is reproducible."""
    file = io.BytesIO()
    metadata: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "sasa_train"}):
        figure.savefig(file, dpi=DPI, format=kind, metadata=metadata.get(kind))
    return file.getvalue()
