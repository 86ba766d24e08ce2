"""The common style of all charts, which keeps them readable in greyscale and for colour-blind people."""

import io
import re
from collections.abc import Iterator, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

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
SIGNED = "PuOr"  # a diverging one with white at zero, also for colour-blind people
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


def legend_label(name: str, num_columns: int = 2) -> str:
    """Return a name as a label that fits into a legend of `num_columns` columns over the width of a figure."""
    return fitted(name, WIDTH / num_columns - 0.75, 8)


def set_title(figure: Figure, text: str, size: float = 9) -> None:
    """Set the title of a figure, broken into lines of at most the figure's width."""
    figure.suptitle(fitted(text, figure.get_figwidth() - 0.4, size, max_lines=9), fontsize=size)


def as_percent(axis: Axes) -> None:
    """Restrict a vertical axis that shows an accuracy to what an accuracy can be, 0 to 100."""
    low, high = axis.get_ylim()
    low, high = max(0.0, low), min(100.0, high)
    axis.set_ylim((low, high) if low < high else (0, 100))


def as_logarithmic(axes: Axes, steps: Sequence[float] = (1, 2, 5), is_horizontal: bool = False) -> None:
    """Make an axis logarithmic, labelled with plain numbers: these steps in each decade, of up to four."""
    (axes.set_xscale if is_horizontal else axes.set_yscale)("log")
    low, high = axes.get_xlim() if is_horizontal else axes.get_ylim()
    axis = axes.xaxis if is_horizontal else axes.yaxis
    axis.set_major_locator(LogLocator(subs=steps if high < 10_000 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def as_epochs(axis: Axis) -> None:
    """Label an axis with whole epochs or steps alone."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def as_label(name: str) -> str:
    """Return a file or class name, escaped so that matplotlib shows it unchanged."""
    # A dollar sign starts a formula, and a leading underscore excludes a name from legends.
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


MAX_NAME = 300  # characters of which a label shows what fits


def fitted(name: str, inches: float, size: float, max_lines: int = 1) -> str:
    """Return a name as a label of at most `max_lines` lines that are at most `inches` wide at a font size in points.

    Lines end after a space or punctuation if possible. What does not fit into the last line is cut out of its middle,
    because the names of classes and runs often differ at their ends.
    """
    text = printable(name)
    if len(text) > MAX_NAME:  # measuring takes time in proportion to the square of the length
        text = f"{text[: MAX_NAME // 2]}...{text[-MAX_NAME // 2 :]}"
    return "\n".join(as_label(line) for line in _lines(text, inches, size, max_lines))


def _lines(text: str, inches: float, size: float, max_lines: int) -> Iterator[str]:
    for _ in range(max_lines - 1):
        if text_width(text, size) <= inches:
            break
        fits = next(n for n in range(len(text), 0, -1) if n == 1 or text_width(text[:n].rstrip(), size) <= inches)
        ends = [found.end() for found in re.finditer(r"[\s,;:_/|.-]+", text[: fits + 1]) if found.end() <= fits]
        end = ends[-1] if ends and ends[-1] > fits / 3 else fits
        yield text[:end].rstrip()
        text = text[end:].lstrip()
    yield _without_middle(text, inches, size)


def _without_middle(text: str, inches: float, size: float) -> str:
    shown = text
    for kept in range(len(text) - 1, 0, -1):
        if text_width(shown, size) <= inches:
            break
        shown = f"{text[: kept - kept // 3]}…{text[len(text) - kept // 3 :]}"
    return shown


def text_width(text: str, size: float) -> float:
    """Return the width in inches of a line of text at a font size in points."""
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return 1.04 * width / 72  # glyphs are rounded to whole pixels when they are drawn


def rendered(figure: Figure, kind: str = "png") -> bytes:
    """Render a figure as PNG, SVG or PDF, without a date or random ids, so that the file is reproducible."""
    file = io.BytesIO()
    metadata: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "sasa_train"}):
        figure.savefig(file, dpi=DPI, format=kind, metadata=metadata.get(kind))
    return file.getvalue()
