"""The report's plots, in the same style as the benchmark charts: readable in greyscale and by colour-blind readers."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_train.config.differences import without_groups
from sasa_train.figures import (
    SOLID,
    WIDTH,
    as_epochs,
    as_logarithmic,
    as_percent,
    fitted,
    legend_below,
    legend_label,
    new_figure,
    rendered,
    set_title,
)
from sasa_train.report.costs import front, points, unit_of
from sasa_train.report.intervals import Interval
from sasa_train.report.page import Picture
from sasa_train.report.rows import Report, Row, figure_of, seed_differences, settings_of
from sasa_train.terminal import progress_bar

MAX_ROWS, MAX_PANELS = 24, 12  # if there are more rows, as in a search, only the best are drawn
MAX_OVERLAID = 3  # rows in one panel of curves; of more, each has its own panel
SPREAD = 10  # of the costs of jobs; above this, their axis is logarithmic
MAX_NUMBERED = 6  # rows whose curves have their numbers, which often end close together
NUMBER_GAP = 0.03  # of the height of a chart, between numbers beside points
ZERO = Interval(0.0, None, 0)
OURS = "#0072B2"
SEED: dict[str, Any] = {"color": "#444444", "marker": ".", "ms": 5, "mew": 0, "alpha": 0.7}
PAPER: dict[str, Any] = {"color": "#E69F00", "marker": "D", "mec": "black", "mew": 0.6}
CAPTIONS = {  # kind of chart -> description
    "accuracy": (
        "Two charts of {figure} over GFLOPs and over million parameters, a numbered point for each row of the table",
        "{figure} of the last epoch over GFLOPs per image and over parameters{over_seeds}. Numbers are "
        "those of the table. Better models are higher up, cheaper ones further left.",
    ),
    "cost": (
        "Curves of val {figure} over the cost of training, one per job, and the highest of all at each cost",
        "val {figure} at each evaluation over what training had cost until then, without evaluations: one curve per "
        "job, alike for the seeds of a row. Numbers are those of the table. The grey steps are the Pareto front: the "
        "highest {figure} that any job had reached at this cost or less.",
    ),
    "curves": (
        "Curves of val {figure} over epochs, by row",
        "val {figure} over epochs: the mean of the seeds. Up to three rows share a panel, with the seeds as dots. With "
        "more rows, each has a panel, with a band from the lowest seed to the highest and the reference row dashed. "
        "Compare the last epochs: {figure} wobbles while the learning rate is high.",
    ),
    "differences": (
        "A chart of each row's difference in {figure} to the reference row, as in the table's column difference",
        "Differences in {figure} to the reference row, paired by seed{over_seeds}, and the paper's beside them where "
        "it prints one.{crossing}",
    ),
    "window": (
        "A chart of the difference in {figure} over kernel_size",
        "The same differences over kernel_size.",
    ),
}
OF_INTERVALS = {
    "over_seeds": ", with 95 % intervals over seeds",
    "crossing": " An interval that crosses 0 leaves open which of the two is better.",
}


def draw_charts(report: Report) -> list[Picture]:
    """Draw every chart for which there is data."""
    figures = draw_figures(report)
    parts = OF_INTERVALS if report.has_intervals else dict.fromkeys(OF_INTERVALS, "")
    parts = parts | {"figure": report.figure}
    return [
        Picture(name, rendered(figure), *(text.format(**parts) for text in CAPTIONS[name]))
        for name, figure in progress_bar(figures.items(), desc="drawing", unit="figure")
    ]


def draw_figures(report: Report) -> dict[str, Figure]:
    """Return the charts by their names, without those that would show a single dot."""
    rows = best([row for row in report.rows if row.jobs], MAX_ROWS)
    if not rows:
        return {}
    figures = {}
    if report.x and any(points(job, row, report.x) for row in rows for job in row.jobs.values()):
        figures["cost"] = _draw_cost([pair for pair in enumerate(report.rows, 1) if pair[1] in rows], report.x)
    if any(len(curve(row)[0]) > 1 for row in rows):
        figures["curves"] = _draw_curves(rows)
    if len({(row.flops, row.params) for row in rows if row.flops and row.params}) > 1:
        figures["accuracy"] = _draw_accuracy([pair for pair in enumerate(report.rows, 1) if pair[1] in rows])
    # A single difference without an interval is a number, which the table has.
    if sum(row.difference.n for row in rows if row.difference) > 1:
        figures["differences"] = _draw_differences(rows)
    lines = window_lines(rows)
    if sum(row.difference.n for line in lines for _, row in line if row.difference) > 1:
        figures["window"] = _draw_windows(lines, report.common)
    return figures


def best(rows: list[Row], count: int) -> list[Row]:
    """Return the `count` rows that reached the most, in their original order."""
    chosen = sorted(rows, key=lambda row: -_last(row).mean)[:count]
    return [row for row in rows if row in chosen]


def limits(intervals: list[Interval]) -> tuple[float, float]:
    """Return axis limits that include all means and intervals."""
    ends = [i.mean + sign * i.bar for i in intervals for sign in (-1, 1)]
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _last(row: Row) -> Interval:
    assert row.last is not None  # rows without jobs are not drawn
    return row.last


def _draw_accuracy(rows: list[tuple[int, Row]]) -> Figure:
    """Plot the last epoch's top1 against FLOPs and parameters, with intervals over seeds and the rows' numbers."""
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
            x, found = sizes[i], _last(row)
            axis.errorbar(
                x, found.mean, found.bar, ecolor="#666666", color=color, marker=marker, mfc=face,
                mec="black", mew=0.8, ms=7, lw=1, capsize=3, ls="",
                label=legend_label(f"{number}  {without_groups(row.label)}"),
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=5)
        around = max(0.1 * (max(sizes) - min(sizes)), 0.05 * max(sizes))  # nearly equal sizes should look nearly equal
        axis.set_xlim(min(sizes) - around, max(sizes) + around)
        axis.set_ylim(limits([_last(row) for _, row in counted]))
        as_percent(axis)
        _number(axis, [(x, _last(row).mean, str(number)) for x, (number, row) in zip(sizes, counted, strict=True)])
    axes[0].set_ylabel(f"{figure_of([row for _, row in rows])} of the last epoch, percent")
    legend_below(figure, axes[0])
    return figure


def _draw_cost(rows: list[tuple[int, Row]], x: str) -> Figure:
    """Plot each job's val top1 over the cost of its training, and the Pareto front of all."""
    found = {i: [curve for job in row.jobs.values() if (curve := points(job, row, x))] for i, row in rows}
    rows = [(i, row) for i, row in rows if found[i]]
    everything = [point for i, _ in rows for curve in found[i] for point in curve]
    ends = [curve[-1][0] for i, _ in rows for curve in found[i]]
    unit, label = unit_of(x, max(ends))
    figure, (axis,) = new_figure(1, 1, 4.2 + 0.22 * ((len(rows) + 1) // 2), "both")
    steps = [*front(everything), (max(ends), max(top1 for _, top1 in everything))]
    axis.plot([cost / unit for cost, _ in steps], [top1 for _, top1 in steps], drawstyle="steps-post", color="#C8C8C8",
              lw=4, label="the highest at this cost or less")  # fmt: skip
    numbers = []
    for place, (i, row) in enumerate(rows):
        color, _, marker, style = SOLID[place % len(SOLID)]
        face = (color, "white", "#B8B8B8")[place // len(SOLID) % 3]
        for number, curve in enumerate(found[i]):
            costs, top1s = [cost / unit for cost, _ in curve], [top1 for _, top1 in curve]
            name = None if number else legend_label(f"{i}  {without_groups(row.label)}")
            axis.plot(costs, top1s, color=color, ls=style, lw=1.2, marker=marker, ms=4, mfc=face, mec="black", mew=0.4,
                      markevery=max(1, len(costs) // 10), label=name)  # fmt: skip
        numbers.append((costs[-1], top1s[-1], str(i)))
    floor = _late_floor([row for _, row in rows])
    if max(ends) > SPREAD * min(ends):
        as_logarithmic(axis, (1, 2, 5), is_horizontal=True)
        axis.set_xlim(0.8 * min(cost for cost, top1 in everything if top1 >= floor) / unit, 1.3 * max(ends) / unit)
    else:
        axis.set_xlim(0, 1.06 * max(ends) / unit)
    axis.set_ylim(bottom=floor)
    as_percent(axis)
    axis.set(xlabel=label, ylabel=f"val {figure_of([row for _, row in rows])}, percent")
    if len(rows) <= MAX_NUMBERED:
        _number(axis, numbers)
    legend_below(figure, axis)
    return figure


def _number(axis: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write each point's number beside it, moved up where it would cover the number of a point below."""
    bottom, top = axis.get_ylim()
    in_axes = axis.transData + axis.transAxes.inverted()  # a horizontal axis may be logarithmic
    taken: list[tuple[float, float]] = []
    for x, y, number in sorted(points, key=lambda point: point[1]):
        across, up = in_axes.transform((x, y))[0], min((y - bottom) / (top - bottom), 0.95)
        while any(abs(across - other) < 0.06 and abs(up - height) < NUMBER_GAP for other, height in taken):
            up += NUMBER_GAP / 4
        taken.append((across, up))
        axis.annotate(
            number, (across, up), xycoords="axes fraction", xytext=(6, 3), textcoords="offset points", fontsize=7
        )


def _draw_curves(rows: list[Row]) -> Figure:
    """Plot val top1 over epochs: a few rows in one panel with their seeds as dots, more rows in a panel each."""
    shown, name = best(rows, MAX_PANELS), f"val {figure_of(rows)}"
    is_one = len(shown) <= MAX_OVERLAID
    num_columns = 1 if is_one else 3
    num_rows = 1 if is_one else -(-len(shown) // num_columns)
    figure, axes = new_figure(num_rows, num_columns, 4.0 if is_one else 0.7 + 2.3 * num_rows, "both")
    if is_one:
        _overlay_curves(axes[0], shown)
        legend_below(figure, axes[0], 1)
    else:
        _curves_by_row(axes, shown)
    floor = _late_floor(shown)
    axes[0].set_ylim(bottom=floor)
    as_percent(axes[0])
    as_epochs(axes[0].xaxis)
    if is_one:
        axes[0].set(xlabel="epoch", ylabel=f"{name}, percent")
    else:
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel(f"{name}, percent", fontsize=9)
    left_out = f"; the best {len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""
    several_seeds = any(len(row.jobs) > 1 for row in shown)
    one = "lines: mean over seeds; dots: the seeds" if several_seeds else f"{name} over epochs, one seed each"
    several = "mean over seeds; band: lowest to highest seed" if several_seeds else one
    several += "; dashed: the reference"
    below = f"; the first epochs, below {max(0, floor):.0f} %, are cut off" if _lowest(shown) < floor else ""
    set_title(figure, f"{one if is_one else several}{left_out}{below}")
    return figure


def _overlay_curves(axis: Axes, rows: list[Row]) -> None:
    for row, (color, _, marker, style) in zip(rows, SOLID, strict=False):
        epochs, means, _, _ = curve(row)
        for job in row.jobs.values() if len(row.jobs) > 1 else ():
            of_seed = {val["epoch"]: val[job.figure] for val in job.val}
            axis.plot(epochs, [of_seed[epoch] for epoch in epochs], ls="", marker=".", ms=4, color=color, alpha=0.6)
        axis.plot(epochs, means, color=color, ls=style, lw=1.6, marker=marker, ms=4, mec="black", mew=0.4,
                  markevery=max(1, len(epochs) // 10), label=legend_label(_described(row), 1))  # fmt: skip


def _described(row: Row) -> str:
    return f"{without_groups(row.label)} (the reference)" if row.reference is row else without_groups(row.label)


def _curves_by_row(axes: list[Axes], rows: list[Row]) -> None:
    num_columns = 3
    for axis in axes[1:]:
        axis.sharex(axes[0])
        axis.sharey(axes[0])
    for axis, row in zip(axes, rows, strict=False):
        if row.reference is not None and row.reference is not row and row.reference.jobs:
            epochs, means, _, _ = curve(row.reference)
            axis.plot(epochs, means, color="#111111", ls="--", lw=1)
        epochs, means, low, high = curve(row)
        axis.fill_between(epochs, low, high, color=OURS, alpha=0.25, lw=0)
        axis.plot(epochs, means, color=OURS, lw=1.6)
        axis.set_title(fitted(_described(row), WIDTH / num_columns - 0.35, 8, 3), fontsize=8)
        axis.label_outer()
    for axis in axes[len(rows) - num_columns : len(rows)]:
        axis.tick_params(labelbottom=True)
    for axis in axes[len(rows) :]:
        axis.set_visible(False)


def _late_floor(rows: list[Row]) -> float:
    """Return a lower axis limit that ignores each curve's first quarter, so that the curves can be told apart."""
    late = []
    for row in rows:
        _, _, low, high = curve(row)
        late += low[len(low) // 4 :] + high[-1:]
    return min(late) - 0.1 * (max(late) - min(late)) - 0.5


def _lowest(rows: list[Row]) -> float:
    return min(value for row in rows for value in curve(row)[2])


def curve(row: Row) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return the epochs at which all seeds were evaluated, with the mean, minimum and maximum of the figure."""
    by_epoch = [{val["epoch"]: val[job.figure] for val in job.val} for job in row.jobs.values()]
    epochs = sorted(set.intersection(*(set(seed) for seed in by_epoch)))
    values = [[seed[epoch] for seed in by_epoch] for epoch in epochs]
    return epochs, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _draw_differences(rows: list[Row]) -> Figure:
    """Plot each row's paired difference from its reference, with its interval, next to the paper's difference."""
    shown = [(row, row.difference) for row in rows if row.difference is not None]
    figure, (axis,) = new_figure(1, 1, 1.5 + 0.4 * len(shown), "x")
    places = range(len(shown))
    bars = [found.bar for _, found in shown]
    of_paper = [(papers, i + 0.22) for i, (row, _) in enumerate(shown) if (papers := row.paper_difference) is not None]
    name = ("ours" if of_paper else "difference") + ", 95 % interval over seeds" * any(bars)
    axis.errorbar([found.mean for _, found in shown], places, xerr=bars, color=OURS, marker="o", lw=1.4, capsize=3,
                  ls="", label=name)  # fmt: skip
    if of_paper:
        axis.plot(*zip(*of_paper, strict=True), ls="", label="the paper's", **PAPER)
    dots = [(found, i - 0.2) for i, (row, _) in enumerate(shown) if len(seed_differences(row)) > 1
            for found in seed_differences(row)]  # fmt: skip
    if dots:
        axis.plot(*zip(*dots, strict=True), ls="", label="a seed", **SEED)
    axis.axvline(0, color="black", lw=1)
    alone = [*of_paper, *dots, (0.0, 0)]
    low, high = limits([found for _, found in shown] + [Interval(mean, None, 0) for mean, _ in alone])
    axis.set_xlim(low, high)
    axis.set_yticks(places, [fitted(without_groups(row.label), 2.4, 8, 2) for row, _ in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    above = _reference_of([row for row, _ in shown])
    axis.set_xlabel(
        fitted(f"{figure_of([row for row, _ in shown])}, percentage points above {above}", 5.0, 9, 3), fontsize=9
    )
    axis.legend(*_ours_first(axis), frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _ours_first(axis: Axes) -> tuple[list[Any], list[str]]:
    """Return the legend entries with our results first, because matplotlib puts error bars last."""
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith(("ours", "difference")))
    return [handles[i] for i in order], [labels[i] for i in order]


def window_lines(rows: list[Row]) -> list[list[tuple[int, Row]]]:
    """Group rows whose runs differ only in kernel_size and seed, each group sorted by kernel_size."""
    lines: dict[tuple, list[tuple[int, Row]]] = {}
    for row in rows:
        kernel_size = row.config.model.kernel_size or 7 if row.config is not None else None
        if row.config is not None and isinstance(kernel_size, int):  # a size per stage has no place on the axis
            rest = settings_of(row.config).items()
            key = tuple(pair for pair in rest if pair[0] not in ("model.kernel_size", "seed"))
            lines.setdefault(key, []).append((kernel_size, row))
    found = (sorted(line, key=lambda point: point[0]) for line in lines.values())
    return [line for line in found if line[0][0] < line[-1][0]]


def _draw_windows(lines: list[list[tuple[int, Row]]], common: dict[str, str]) -> Figure:
    """Plot the table's differences against window size, a line for each setting of the other keys."""
    figure, (axis,) = new_figure(1, 1, 3.8, "both")
    for i, line in enumerate(lines):
        settings = {k: v for k, v in line[0][1].settings.items() if k != "model.kernel_size" and common.get(k) != v}
        rest = ", ".join(f"{key}={value}" for key, value in settings.items())
        color, _, marker, style = SOLID[i % len(SOLID)]
        beside = 0.1 * (i - (len(lines) - 1) / 2)
        found = [(size + beside, ZERO if row.reference is row else row.difference) for size, row in line]
        points = [(size, difference.mean, difference.bar) for size, difference in found if difference]
        if points:
            x, y, half_widths = zip(*points, strict=True)
            whose = "ours" if any(row.paper for _, row in lines[0]) else "difference"
            name = legend_label(f"{whose}, {without_groups(rest)}" if rest else whose)
            axis.errorbar(x, y, half_widths, color=color, marker=marker, ls=style, lw=1.4, capsize=3, label=name)
    line = lines[0]
    of_paper = [(size, 0.0 if row.reference is row else row.paper_difference) for size, row in line if row.paper]
    of_paper = [(size, difference) for size, difference in of_paper if difference is not None]
    if len(of_paper) > 1:
        axis.plot(*zip(*of_paper, strict=True), ls="--", label="the paper's (ImageNet, ResNet-50)", **PAPER)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(sorted({size for line in lines for size, _ in line}))
    axis.set_xlabel("kernel_size")
    rows = [row for line in lines for _, row in line]
    axis.set_ylabel(fitted(f"{figure_of(rows)}, percentage points above {_reference_of(rows)}", 3.0, 9, 3), fontsize=9)
    axis.legend(*_ours_first(axis), frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _reference_of(rows: list[Row]) -> str:
    """Name the row that others are compared with, which is the same in all charts."""
    labels = list(dict.fromkeys(without_groups(row.reference.label) for row in rows if row.reference))
    return labels[0] if len(labels) == 1 else "its reference"
