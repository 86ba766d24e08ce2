"""One style for every chart, readable in grey and by colour-blind people."""

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_train.terminal import printable

# Those of Okabe and Ito's colours that differ in grey too, each with its own hatch and marker.
STYLES = (
    ("#B8B8B8", "", "o", "-"),
    ("#0072B2", "", "s", "-"),
    ("#E69F00", "///", "^", "--"),
    ("#111111", "", "D", ":"),
    ("#56B4E9", "...", "v", "-."),
    ("#F0E442", "xx", "P", "--"),
)
SOLID = STYLES[1:]  # points and lines need more contrast than grey bars
MAGNITUDES = "cividis"  # a colour map whose grey rises evenly with the value, for normal and colour-blind eyes alike
GRID = "#DDDDDD"
WIDTH, DPI = 8.0, 150


def new_figure(num_rows: int, num_columns: int, height: float, grid: str = "") -> tuple[Figure, list[Axes]]:
    """Make a figure of WIDTH x `height` inches and its axes, row by row; `grid`: lines across "x", "y" or "both"."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        if grid:
            axis.grid(axis=grid, color=GRID, lw=0.6)
    return figure, axes


def legend_below(figure: Figure, axis: Axes, num_columns: int = 2) -> None:
    """Put one legend for all axes below the figure, with the labels of `axis`."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False, fontsize=8)


def as_label(name: str) -> str:
    """Return a name from a disk as text that matplotlib shows unchanged."""
    # A dollar would begin a formula, and an underscore at the front would keep a name out of legends.
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def rendered(figure: Figure, kind: str = "png") -> bytes:
    """Return a figure as PNG, SVG or PDF; the same picture gives the same file, without date and random ids."""
    file = io.BytesIO()
    metadata: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "sasa_train"}):
        figure.savefig(file, dpi=DPI, format=kind, metadata=metadata.get(kind))
    return file.getvalue()
