"""The report's plots, in the style of the benchmarks' charts: told apart in grey and by the colour-blind."""

import io
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_train.benchmark.charts import DPI, STYLES, new_figure
from sasa_train.report.rows import Report, Row, paired_difference

MAX_PANELS = 12  # curves of more rows: the best alone
MAX_LABEL = 48
OURS, PAPER = "#0072B2", "#E69F00"
SOLID = [style for style in STYLES if style[0] != "#B8B8B8"]  # points and lines need more contrast than bars


def draw_charts(report: Report) -> dict[str, bytes]:
    """File name -> PNG, of what there is to draw."""
    rows = [row for row in report.rows if row.jobs]
    if not rows:
        return {}
    figures = {"accuracy.png": _draw_accuracy(rows), "curves.png": _draw_curves(rows)}
    if any(row.difference for row in rows):
        figures["differences.png"] = _draw_differences(rows)
    if lines := window_lines(rows):
        figures["window.png"] = _draw_windows(lines)
    return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()


def short(label: str) -> str:
    """Without the keys' groups, and not too long for a legend."""
    text = "  ".join(part.rpartition(".")[2] if "=" in part else part for part in _split(label))
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def _split(label: str) -> list[str]:
    parts = []
    for part in label.split("  "):
        key, equals, value = part.partition("=")
        parts.append(key.rpartition(".")[2] + equals + value if equals else part)
    return parts


def _half_width(row: Row) -> float:
    return (row.top1.half_width if row.top1 else None) or 0.0


def _draw_accuracy(rows: list[Row]) -> Figure:
    """top1 of the last epoch over FLOPs and over parameters, with the interval over seeds."""
    counted = [row for row in rows if row.flops and row.params]
    figure, axes = new_figure(1, 2, 3.6 + 0.22 * ((len(counted) + 1) // 2))
    quantities: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("GFLOPs an image, forward", lambda row: (row.flops or 0) / 1e9),
        ("million parameters", lambda row: (row.params or 0) / 1e6),
    )
    for axis, (label, quantity) in zip(axes, quantities, strict=True):
        for i, row in enumerate(counted):
            color, _, marker, _ = SOLID[i % len(SOLID)]
            face = color if i < len(SOLID) else "white"
            axis.errorbar(
                quantity(row), row.top1.mean, _half_width(row), color=color, marker=marker, mfc=face, mec="black",
                mew=0.6, ms=7, lw=1.2, capsize=3, ls="", label=short(row.label),
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.grid(color="#DDDDDD", lw=0.6)
        axis.margins(x=0.1)
    axes[0].set_ylabel("top1 of the last epoch, percent")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw_curves(rows: list[Row]) -> Figure:
    """val top1 over epochs: a panel a row, mean and range of the seeds, the reference's mean dashed beside it."""
    best = sorted(rows, key=lambda row: -row.top1.mean)[:MAX_PANELS]
    shown = [row for row in rows if row in best]
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure, axes = new_figure(num_rows, num_columns, 0.7 + 2.1 * num_rows)
    for axis, row in zip(axes, shown, strict=False):
        if row.reference not in (None, row) and row.reference.jobs:
            epochs, means, _, _ = curve(row.reference)
            axis.plot(epochs, means, color="#111111", ls="--", lw=1, label=f"reference: {short(row.reference.label)}")
        epochs, means, low, high = curve(row)
        axis.fill_between(epochs, low, high, color=OURS, alpha=0.25, lw=0)
        axis.plot(epochs, means, color=OURS, lw=1.6, marker="o" if len(epochs) < 3 else "")
        axis.set_title(short(row.label), fontsize=8)
        axis.grid(color="#DDDDDD", lw=0.6)
        axis.sharey(axes[0])
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("val top1, percent", fontsize=9)
    left_out = f"; the best {len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""
    figure.suptitle(f"mean over seeds; band: lowest to highest seed; dashed: the reference{left_out}", fontsize=9)
    return figure


def curve(row: Row) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs that every seed has evaluated, with the mean, lowest and highest top1."""
    by_epoch = [{val["epoch"]: val["top1"] for val in job.val} for job in row.jobs.values()]
    epochs = sorted(set.intersection(*(set(seed) for seed in by_epoch)))
    values = [[seed[epoch] for seed in by_epoch] for epoch in epochs]
    return epochs, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _draw_differences(rows: list[Row]) -> Figure:
    """Each row's paired difference to its reference with the interval, and the paper's beside it."""
    shown = [row for row in rows if row.difference]
    figure, (axis,) = new_figure(1, 1, 1.5 + 0.4 * len(shown))
    for i, row in enumerate(shown):
        found = row.difference
        label = "ours, 95 % interval over seeds" if i == 0 else None
        axis.errorbar(found.mean, i, xerr=found.half_width or 0, color=OURS, marker="o", lw=1.4, capsize=3, ls="",
                      label=label)  # fmt: skip
    of_paper = [(i + 0.22, row.paper_difference) for i, row in enumerate(shown) if row.paper_difference is not None]
    if of_paper:
        places, differences = zip(*of_paper, strict=True)
        axis.plot(differences, places, color=PAPER, marker="D", mec="black", mew=0.6, ls="", label="the paper's")
    axis.axvline(0, color="black", lw=1)
    axis.set_yticks(range(len(shown)), [short(row.label) for row in shown], fontsize=8)
    axis.invert_yaxis()
    references = list(dict.fromkeys(short(row.reference.label) for row in shown))
    axis.set_xlabel(f"top1, percentage points above: {'; '.join(references)}", fontsize=9)
    axis.grid(axis="x", color="#DDDDDD", lw=0.6)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def window_lines(rows: list[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Rows that differ in kernel_size alone, by what else is set; each line by rising kernel_size."""
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        rest = "  ".join(f"{k}={v}" for k, v in row.settings.items() if k != "model.kernel_size")
        if "model.kernel_size" in row.settings and row.config is not None:
            lines.setdefault(rest, []).append((row.config.model.kernel_size or 7, row))
    return {rest: sorted(line, key=lambda point: point[0]) for rest, line in lines.items() if len(line) > 1}


def _draw_windows(lines: dict[str, list[tuple[int, Row]]]) -> Figure:
    """The paired difference to each line's own reference over the window; the paper's Table 4 beside it."""
    figure, (axis,) = new_figure(1, 1, 3.8)
    sizes = sorted({size for line in lines.values() for size, _ in line})
    for i, (rest, line) in enumerate(lines.items()):
        color, _, marker, style = SOLID[i % len(SOLID)]
        reference = window_reference(line)
        found = [(size, paired_difference(row, reference)) for size, row in line]
        points = [(size, d.mean, 0.0 if row is reference else d.half_width or 0.0)
                  for (size, d), (_, row) in zip(found, line, strict=True) if d]  # fmt: skip
        x, y, half_widths = zip(*points, strict=True)
        name = f"ours{f', {short(rest)}' if rest else ''}"
        axis.errorbar(x, y, half_widths, color=color, marker=marker, ls=style, lw=1.4, capsize=3, label=name)
    _draw_paper_windows(axis, lines)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(sizes)
    axis.set_xlabel("kernel_size")
    first = window_reference(next(iter(lines.values())))
    axis.set_ylabel(f"top1, percentage points\nabove kernel_size {first.config.model.kernel_size or 7}")
    axis.grid(color="#DDDDDD", lw=0.6)
    axis.legend(frameon=False, fontsize=8)
    return figure


def window_reference(line: list[tuple[int, Row]]) -> Row:
    """kernel_size 7, the paper's default, or else the smallest."""
    return next((row for size, row in line if size == 7), line[0][1])


def _draw_paper_windows(axis: Axes, lines: dict[str, list[tuple[int, Row]]]) -> None:
    line = next(iter(lines.values()))
    reference = window_reference(line).paper
    points = [(size, row.paper.top1 - reference.top1) for size, row in line if row.paper and reference]
    if len(points) > 1:
        x, y = zip(*points, strict=True)
        axis.plot(
            x, y, color=PAPER, marker="D", mec="black", mew=0.6, ls="--", label="the paper's, ImageNet, ResNet-50"
        )
