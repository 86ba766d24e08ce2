"""The report as Markdown, CSV and JSON."""

import itertools
import json
import textwrap
from collections import Counter
from typing import Any

from sasa_train.config.derived import in_pixels, resolved_size
from sasa_train.config.differences import without_groups
from sasa_train.config.keys import TrainConfig
from sasa_train.files import csv_text
from sasa_train.paper import HELD_OUT_TABLES
from sasa_train.report.costs import COSTS, describe_front, final_cost
from sasa_train.report.intervals import ENOUGH, FEW, Interval, still_exclude_zero
from sasa_train.report.rows import Report, Row
from sasa_train.terminal import duration

LAST = ", last epoch"  # in the heading of the figure that is compared
SHORT = {"best epoch": "best"}  # headings of the table on a terminal
MIN_LABEL = 24  # columns of a terminal for the label of a row


def markdown(report: Report) -> str:
    lines = [f"# {title(report)}", "", *_grid([cells(report, i, row) for i, row in enumerate(report.rows, 1)]), ""]
    lines += [f"- {note}" for note in notes(report)]
    if report.not_counted:
        states = Counter(job.state for job, _ in report.not_counted)
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        lines += ["", f"Not in the figures: {counts}", "", *_grid(not_counted(report))]
    return "\n".join(lines) + "\n"


def for_terminal(report: Report, width: int) -> str:
    """Return the report for a terminal of `width` columns, with as many of the table's columns as fit."""
    lines = [cells(report, i, row) | {"row": without_groups(row.label)} for i, row in enumerate(report.rows, 1)]
    columns = {
        SHORT.get(name, name.removesuffix(LAST)): [line[name].replace(": too few", "") for line in lines]
        for name in lines[0]
    }
    widths = {name: max(map(len, (name, *texts))) for name, texts in columns.items()}
    left_out = []
    while len(columns) > 4 and width - sum(widths[name] + 2 for name in columns if name != "row") < min(
        widths["row"], MIN_LABEL
    ):
        left_out.append(list(columns)[-1])
        del columns[left_out[-1]]
    room = max(MIN_LABEL, width - sum(widths[name] + 2 for name in columns if name != "row"))
    text = [title(report), ""]
    for number, label in enumerate(["row", *columns["row"]]):
        first, *others = textwrap.wrap(label, room, break_on_hyphens=False)
        cut = {name: name if not number else texts[number - 1] for name, texts in columns.items()} | {"row": first}
        size = widths | {"row": min(room, widths["row"])}
        text.append("  ".join(cut[name].ljust(size[name]) for name in columns).rstrip())
        text += [" " * (widths["#"] + 2) + other for other in others]
    said = notes(report)
    said += [f"a wider terminal and table.md also show: {', '.join(reversed(left_out))}"] if left_out else []
    listed = [
        f"{line['state']}: {line['row'] or line['job']}  {line['reason']}".strip() for line in not_counted(report)
    ]
    for heading, items in (("", said), ("Not in the figures:", listed)):
        wrapped = [textwrap.fill(f"- {item}", width, subsequent_indent="  ") for item in items]
        text += ["", *filter(None, [heading]), *wrapped] if items else []
    return "\n".join(text) + "\n"


def title(report: Report) -> str:
    done = len(report.all_jobs)
    what = f"Table {report.table} of the paper, ours beside it" if report.table else "Report"
    return f"{what}: {done} of {done + len(report.not_counted)} jobs"


def not_counted(report: Report) -> list[dict[str, str]]:
    """Return one line for each job that is excluded from the figures."""
    return [
        {"job": job.name, "row": label, "state": job.state, "reason": job.reason.partition("\n")[0]}
        for job, label in report.not_counted
    ]


def cells(report: Report, number: int, row: Row) -> dict[str, str]:
    """Return one line of the table as a mapping from column to text."""
    seconds, difference, papers = row.mean("seconds"), row.difference, row.paper
    top1, mparams, gflops = (papers.top1, papers.mparams, papers.gflops) if papers else (None, None, None)
    found = {
        "#": str(number),
        "row": row.label,
        "seeds": f"{len(row.jobs)}/{row.num_jobs}",
        f"{report.figure}{LAST}": _interval(row.last),
        "best epoch": shown(_mean(row.mean("best")), "{:.2f}"),
        "difference": "reference" if row.reference is row else _difference(row),
        "excludes 0": _excludes_zero(difference),
        "paper top1": shown(top1, "{:.1f}"),
        "paper difference": "reference" if papers and row.reference is row else shown(row.paper_difference, "{:+.1f}"),
        **cost_cells(report, row),
        "M params": in_millions(row.params),
        "paper M": shown(mparams, "{:.1f}"),
        "GFLOPs": in_billions(row.flops),
        "paper G": shown(gflops, "{:.1f}"),
        "images/s": shown(_mean(row.mean("images_per_sec")), "{:,.0f}"),
        "training time": duration(seconds.mean) if seconds else "-",
    }
    return {name: text for name, text in found.items() if report.table or not name.startswith("paper")}


def cost_cells(report: Report, row: Row) -> dict[str, str]:
    """Return the columns that --x adds: what training had cost at the last evaluation, the asked cost first."""
    names = sorted(COSTS, key=lambda name: name != report.x) if report.x else []
    found = {name: final_cost(row, name) for name in names}
    if (flops := found.get("flops")) is not None:
        found["flops"] = flops / 1e15
    return {COSTS[name][0]: shown(found[name], COSTS[name][1]) for name in names}


def shown(number: Any, form: str, otherwise: str = "-") -> str:
    """Format a number; return `otherwise` if it is missing or, because of a damaged file, not a number."""
    return form.format(number) if isinstance(number, int | float) else otherwise


def in_millions(params: int | None) -> str:
    return shown(params and params / 1e6, "{:.2f}")


def in_billions(flops: int | None) -> str:
    return shown(flops and flops / 1e9, "{:.3g}")


def _grid(rows: list[dict[str, str]]) -> list[str]:
    """Return a Markdown table with aligned columns."""
    lines = [list(rows[0]), *([text.replace("|", "\\|") for text in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = (
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    if interval.half_width is None:
        spread = "(1 seed)"
    else:
        spread = f"± {interval.half_width:.2f}" if interval.is_shown else f"({interval.n} seeds: too few)"
    return f"{interval.mean:{sign}.2f} {spread}"


def _excludes_zero(difference: Interval | None) -> str:
    if difference is None or not difference.is_shown:
        return "-"
    return "yes" if difference.excludes_zero else "no"


def _difference(row: Row) -> str:
    """Format the difference, with the number of pairs if some seeds have no counterpart."""
    found = row.difference
    pairs = f" ({found.n} pairs)" if found is not None and 1 < found.n < len(row.jobs) else ""
    return _interval(found, sign="+") + pairs


def notes(report: Report) -> list[str]:
    """Return notes that explain how to read the figures."""
    figure = report.figure
    found = [f"{figure} in percent, of the last epoch (the best epoch is selected on val, so its figure is optimistic)"]
    configs = [row.config for row in report.rows if row.config is not None]
    splits = list(dict.fromkeys(split_of(config) for config in configs))
    if report.common:
        usual = ", ".join(f"{key}={value}" for key, value in report.common.items())
        found.append(f"rows are named by what differs from the commonest values: {usual}")
    found.append(f"val is {'; or '.join(splits)}" + ("" if len(splits) == 1 else ": rows differ in it"))
    if report.has_intervals:
        found.append(
            "± is the 95 % confidence interval of the mean over seeds (Student's t). It covers only the seeds, not the "
            "choice of val images"
        )
    found += [report.val_note] if report.val_note else []
    if report.x and (found_front := describe_front(report.rows, report.x)):
        found.append(found_front)
    references = list(dict.fromkeys(row.reference.label for row in report.rows if row.reference is not None))
    if references:
        against = references[0] if len(references) == 1 else f"the reference row ({'; '.join(references)})"
        found.append(f"difference: {figure} minus that of {against}, paired by seed")
    with_interval = {row.label: row.difference for row in report.rows if row.difference and row.difference.is_shown}
    if len(with_interval) > 2:
        found.append(
            f"{len(with_interval)} differences: where none is real, one in twenty intervals still excludes 0; "
            f"{_after_correction(with_interval)}"
        )
    counts = sorted({len(row.jobs) for row in report.rows if row.jobs})
    if counts and counts[0] < FEW:
        how_many = " to ".join(dict.fromkeys(str(count) for count in (counts[0], counts[-1])))
        rests = f"the intervals rest on {figure} being normally distributed over seeds; "
        fewer = f"fewer than {ENOUGH} have no interval here"
        found.append(f"few seeds ({how_many}): {rests if report.has_intervals else ''}{fewer}")
    return found + (_paper_notes(report.table, configs) if report.table else [])


def _after_correction(differences: dict[str, Interval]) -> str:
    kept = list(itertools.compress(differences, still_exclude_zero([*differences.values()])))
    return "after Holm's correction for their number, " + (f"only {'; '.join(kept)}" if kept else "none does")


def _paper_notes(table: int, configs: list[TrainConfig]) -> list[str]:
    line, compare = f"paper: ImageNet, as arXiv 1906.05909 prints it in Table {table}", ""
    is_other_data = any(config.data.name != "imagenet" for config in configs)
    if table != 1 and (is_other_data or any("50" not in config.model.name for config in configs)):
        line, compare = f"{line}, ResNet-50", "another depth or data set"
    elif is_other_data:
        compare = "another data set"
    if compare:
        line += f"; ours is {compare}: compare the differences, not the figures"
    held_out = held_out_note(table, configs)
    return [line, held_out] if held_out else [line]


def held_out_note(table: int, configs: list[TrainConfig]) -> str:
    """Return a caveat if only one of the two top1 values (ours and the paper's) was measured on val, else ""."""
    papers_is = table in HELD_OUT_TABLES
    if all((config.data.holdout_fraction > 0) == papers_is for config in configs):
        return ""
    if papers_is:
        return "the paper's top1 of this table is on 4 % held out of train, ours is not (data.holdout_fraction=0.04)"
    return "ours is on images held out of train, the paper's top1 of this table is not"


def split_of(config: TrainConfig) -> str:
    """Describe the val split in words."""
    data = config.data
    part = "" if data.max_val_images is None else f", {data.max_val_images:,} images of it at most"
    size = f"{data.title} at {in_pixels(resolved_size(data))}"
    if data.holdout_fraction > 0:
        return f"{100 * data.holdout_fraction:g} % held out of train of {size}{part}"
    if data.name == "digits":
        return f"the fixed fifth of {size} that is not trained on{part}"
    return f"the set's own val or test images of {size}{part}"


def as_json(report: Report) -> str:
    """Return the whole report as JSON, with results for each seed."""
    content = {
        "format_version": 1,
        "commands": report.commands,
        "paper_table": report.table,
        "notes": notes(report),
        "rows": [_record(report, i, row) | {"runs": _runs(row)} for i, row in enumerate(report.rows, 1)],
        "not_counted": [
            {"job": job.name, "row": label, "state": job.state, "reason": job.reason}
            for job, label in report.not_counted
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def as_csv(report: Report) -> str:
    records = [_record(report, i, row) for i, row in enumerate(report.rows, 1)]
    flat = [record | {"settings": json.dumps(record["settings"])} for record in records]
    return csv_text([list(flat[0]), *(record.values() for record in flat)])


def _record(report: Report, number: int, row: Row) -> dict[str, Any]:
    """Return the row's figures as plain values, with None for missing ones."""
    figure = report.figure
    difference, papers = row.difference, row.paper
    return {
        "number": number,
        "row": row.label,
        "settings": row.settings,
        "seeds_done": len(row.jobs),
        "seeds": row.num_jobs,
        **_spread(figure, row.last),
        **_spread(f"best_{figure}", row.mean("best")),
        "reference": row.reference.label if row.reference else None,
        **_spread("difference", difference),
        "difference_seeds": difference and difference.n,
        "difference_excludes_zero": difference and difference.excludes_zero,
        "params": row.params,
        "flops": row.flops,
        "images_per_sec": _mean(row.mean("images_per_sec")),
        "training_seconds": _mean(row.mean("seconds")),
        **({f"training_{name}": final_cost(row, name) for name in COSTS} if report.x else {}),
        "paper_row": papers and papers.label,
        "paper_top1": papers and papers.top1,
        "paper_difference": None if row.paper_difference is None else round(row.paper_difference, 1),
        "paper_mparams": papers and papers.mparams,
        "paper_gflops": papers and papers.gflops,
    }


def _spread(name: str, interval: Interval | None) -> dict[str, float | None]:
    return {name: _mean(interval), f"{name}_half_width": interval.half_width if interval else None}


def _mean(interval: Interval | None) -> float | None:
    return interval.mean if interval else None


def _runs(row: Row) -> list[dict[str, Any]]:
    return [
        {
            "run": job.name,
            "seed": seed,
            job.figure: job.last,
            f"best_{job.figure}": job.best,
            "epoch": job.val[-1]["epoch"],
        }
        for seed, job in sorted(row.jobs.items())
    ]
