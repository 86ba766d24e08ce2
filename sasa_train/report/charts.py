"""The report's plots, in the same style as the benchmark charts: readable in greyscale and by colour-blind readers."""

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_train.figures import SOLID, as_label, legend_below, new_figure, rendered
from sasa_train.report.intervals import Interval
from sasa_train.report.page import Picture
from sasa_train.report.rows import Report, Row, paired_difference

MAX_ROWS, MAX_PANELS = 24, 12  # if there are more rows, as in a search, only the best are drawn
MAX_LABEL = 48
OURS = "#0072B2"
PAPER: dict[str, Any] = {"color": "#E69F00", "marker": "D", "mec": "black", "mew": 0.6}
CAPTIONS = {  # kind of chart -> description
    "accuracy": (
        "Two charts of top1 over GFLOPs and over million parameters, a numbered point for each row of the table",
        "top1 of the last epoch over GFLOPs per image and over parameters, with 95 % intervals over seeds. Numbers are "
        "those of the table.",
    ),
    "curves": (
        "Curves of val top1 over epochs, a panel for each row",
        "val top1 over epochs: the mean of the seeds, a band from the lowest to the highest, and dashed the reference "
        "row.",
    ),
    "differences": (
        "A chart of each row's difference in top1 to the reference row, the figures of the table's column difference",
        "Differences in top1 to the reference row, paired by seed, with 95 % intervals, and the paper's beside them "
        "where it prints one.",
    ),
    "window": (
        "A chart of the difference in top1 over kernel_size",
        "The same differences over kernel_size.",
    ),
}


def draw_charts(report: Report) -> list[Picture]:
    """Draw every chart for which there is data."""
    rows = best([row for row in report.rows if row.jobs], MAX_ROWS)
    if not rows:
        return []
    figures = {"curves": _draw_curves(rows)}
    if any(row.flops and row.params for row in rows):
        figures["accuracy"] = _draw_accuracy([pair for pair in enumerate(report.rows, 1) if pair[1] in rows])
    if any(row.difference for row in rows):
        figures["differences"] = _draw_differences(rows)
    if lines := window_lines(rows):
        figures["window"] = _draw_windows(lines)
    return [Picture(name, rendered(figure), *CAPTIONS[name]) for name, figure in figures.items()]


def best(rows: list[Row], count: int) -> list[Row]:
    """Return the `count` rows with the highest top1, in their original order."""
    chosen = sorted(rows, key=lambda row: -_top1(row).mean)[:count]
    return [row for row in rows if row in chosen]


def short(label: str) -> str:
    """Shorten a label for a legend: drop the key groups and truncate to MAX_LABEL characters."""
    text = ", ".join(re.sub(r"^[a-z_.]+\.([a-z_0-9]+=)", r"\1", part) for part in label.split(", "))
    return as_label(text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…")


def limits(intervals: list[Interval]) -> tuple[float, float]:
    """Return axis limits that include all means and intervals; only two-seed intervals (t = 12.7) may be cut off."""
    trusted = [i for i in intervals if i.n > 2] or intervals
    ends = [i.mean + sign * (i.half_width or 0) for i in trusted for sign in (-1, 1)]
    ends += [i.mean for i in intervals]
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _top1(row: Row) -> Interval:
    assert row.top1 is not None  # rows without jobs are not drawn
    return row.top1


def _draw_accuracy(rows: list[tuple[int, Row]]) -> Figure:
    """Plot last-epoch top1 against FLOPs and parameters, with intervals over seeds and the row numbers of the table."""
    counted = [(number, row) for number, row in rows if row.flops and row.params]
    figure, axes = new_figure(1, 2, 3.6 + 0.22 * ((len(counted) + 1) // 2), "both")
    for axis, label, key, unit in (
        (axes[0], "GFLOPs per image, forward", "flops", 1e9),
        (axes[1], "million parameters", "params", 1e6),
    ):
        sizes = [getattr(row, key) / unit for _, row in counted]
        for i, (number, row) in enumerate(counted):
            color, _, marker, _ = SOLID[i % len(SOLID)]
            face = (color, "white", "#B8B8B8")[i // len(SOLID) % 3]
            x, found = sizes[i], _top1(row)
            axis.errorbar(
                x, found.mean, found.half_width or 0, ecolor="#666666", color=color, marker=marker, mfc=face,
                mec="black", mew=0.8, ms=7, lw=1, capsize=3, ls="", label=f"{number}  {short(row.label)}",
            )  # fmt: skip
            axis.annotate(f"{number}", (x, found.mean), xytext=(6, 3), textcoords="offset points", fontsize=7)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=5)
        around = max(0.1 * (max(sizes) - min(sizes)), 0.05 * max(sizes))  # nearly equal sizes should look nearly equal
        axis.set_xlim(min(sizes) - around, max(sizes) + around)
        axis.set_ylim(limits([_top1(row) for _, row in counted]))
    axes[0].set_ylabel("top1 of the last epoch, percent")
    legend_below(figure, axes[0])
    return figure


def _draw_curves(rows: list[Row]) -> Figure:
    """Plot the mean and range of val top1 over seeds by epoch, one panel per row; the reference's mean is dashed."""
    shown = best(rows, MAX_PANELS)
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure, axes = new_figure(num_rows, num_columns, 0.7 + 2.1 * num_rows, "both")
    for axis in axes[1:]:
        axis.sharex(axes[0])
        axis.sharey(axes[0])
    for axis, row in zip(axes, shown, strict=False):
        if row.reference is not None and row.reference is not row and row.reference.jobs:
            epochs, means, _, _ = curve(row.reference)
            axis.plot(epochs, means, color="#111111", ls="--", lw=1)
        epochs, means, low, high = curve(row)
        axis.fill_between(epochs, low, high, color=OURS, alpha=0.25, lw=0)
        axis.plot(epochs, means, color=OURS, lw=1.6, marker="o" if len(epochs) < 3 else "")
        axis.set_title(short(row.label), fontsize=8)
        axis.label_outer()
    for axis in axes[len(shown) - num_columns : len(shown)]:
        axis.tick_params(labelbottom=True)
    axes[0].set_ylim(bottom=_late_floor(shown))
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("val top1, percent", fontsize=9)
    left_out = f"; the best {len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""
    figure.suptitle(f"mean over seeds; band: lowest to highest seed; dashed: the reference{left_out}", fontsize=9)
    return figure


def _late_floor(rows: list[Row]) -> float:
    """Return a lower axis limit that ignores each curve's first quarter, so that the curves can be told apart."""
    late = []
    for row in rows:
        _, _, low, high = curve(row)
        late += low[len(low) // 4 :] + high[-1:]
    return min(late) - 0.1 * (max(late) - min(late)) - 0.5


def curve(row: Row) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return the epochs at which all seeds were evaluated, with the mean, minimum and maximum top1."""
    by_epoch = [{val["epoch"]: val["top1"] for val in job.val} for job in row.jobs.values()]
    epochs = sorted(set.intersection(*(set(seed) for seed in by_epoch)))
    values = [[seed[epoch] for seed in by_epoch] for epoch in epochs]
    return epochs, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _draw_differences(rows: list[Row]) -> Figure:
    """Plot each row's paired difference from its reference, with its interval, next to the paper's difference."""
    shown = [(row, row.difference) for row in rows if row.difference is not None]
    figure, (axis,) = new_figure(1, 1, 1.5 + 0.4 * len(shown), "x")
    places = range(len(shown))
    axis.errorbar([found.mean for _, found in shown], places, xerr=[found.half_width or 0 for _, found in shown],
                  color=OURS, marker="o", lw=1.4, capsize=3, ls="", label="ours, 95 % interval over seeds")  # fmt: skip
    of_paper = [(papers, i + 0.22) for i, (row, _) in enumerate(shown) if (papers := row.paper_difference) is not None]
    if of_paper:
        axis.plot(*zip(*of_paper, strict=True), ls="", label="the paper's", **PAPER)
    axis.axvline(0, color="black", lw=1)
    low, high = limits([found for _, found in shown] + [Interval(mean, None, 0) for mean, _ in [*of_paper, (0.0, 0)]])
    axis.set_xlim(low, high)
    axis.set_yticks(places, [short(row.label) for row, _ in shown], fontsize=8)
    axis.invert_yaxis()
    references = list(dict.fromkeys(short(row.reference.label) for row, _ in shown if row.reference))
    above = references[0] if len(references) == 1 else "its reference"
    axis.set_xlabel(f"top1, percentage points above {above}", fontsize=9)
    axis.legend(*_ours_first(axis), frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _ours_first(axis: Axes) -> tuple[list[Any], list[str]]:
    """Return the legend entries with our results first, because matplotlib puts error bars last."""
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("ours"))
    return [handles[i] for i in order], [labels[i] for i in order]


def window_lines(rows: list[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Group rows that differ only in kernel_size by their other settings, each group sorted by kernel_size."""
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        rest = ", ".join(f"{k}={v}" for k, v in row.settings.items() if k != "model.kernel_size")
        if "model.kernel_size" in row.settings and row.config is not None:
            lines.setdefault(rest, []).append((row.config.model.kernel_size or 7, row))
    return {rest: sorted(line, key=lambda point: point[0]) for rest, line in lines.items() if len(line) > 1}


def _draw_windows(lines: dict[str, list[tuple[int, Row]]]) -> Figure:
    """Plot the paired differences from each line's own reference against window size, with the paper's Table 4."""
    figure, (axis,) = new_figure(1, 1, 3.8, "both")
    references = {rest: window_reference(line) for rest, line in lines.items()}
    for i, (rest, line) in enumerate(lines.items()):
        color, _, marker, style = SOLID[i % len(SOLID)]
        _, reference = references[rest]
        found = [(size, paired_difference(row, reference), row is reference) for size, row in line]
        beside = 0.1 * (i - (len(lines) - 1) / 2)
        points = [(size + beside, d.mean, 0 if is_it else d.half_width or 0) for size, d, is_it in found if d]
        name = f"ours, {short(rest)}" if rest else "ours"
        x, y, half_widths = zip(*points, strict=True)
        axis.errorbar(x, y, half_widths, color=color, marker=marker, ls=style, lw=1.4, capsize=3, label=name)
    rest, line = next(iter(lines.items()))
    of_paper = [(size, row.paper.top1 - p.top1) for size, row in line if row.paper and (p := references[rest][1].paper)]
    if len(of_paper) > 1:
        axis.plot(*zip(*of_paper, strict=True), ls="--", label="the paper's (ImageNet, ResNet-50)", **PAPER)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(sorted({size for line in lines.values() for size, _ in line}))
    axis.set_xlabel("kernel_size")
    above = " or ".join(map(str, sorted({size for size, _ in references.values()})))
    axis.set_ylabel(f"top1, percentage points\nabove kernel_size {above} (95 % intervals)", fontsize=9)
    axis.legend(*_ours_first(axis), frameon=False, fontsize=8)
    return figure


def window_reference(line: list[tuple[int, Row]]) -> tuple[int, Row]:
    """Return the point with kernel_size 7, the paper's default, or else the one with the smallest kernel_size."""
    return next((point for point in line if point[0] == 7), line[0])
