"""The report as Markdown, CSV and JSON."""

import csv
import io
import json
from collections import Counter
from typing import Any

from sasa_train.config.derived import resolved_image_size
from sasa_train.config.keys import TrainConfig
from sasa_train.report.intervals import FEW, Interval
from sasa_train.report.rows import Report, Row
from sasa_train.terminal import duration

HELD_OUT_TABLES = (3, 5)  # of the paper: top1 on 4 % held out of train


def markdown(report: Report) -> str:
    lines = [f"# {title(report)}", "", *_grid([cells(report, i, row) for i, row in enumerate(report.rows, 1)]), ""]
    lines += [f"- {note}" for note in notes(report)]
    if report.not_counted:
        states = Counter(job.state for job, _ in report.not_counted)
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        lines += ["", f"Not in the figures: {counts}", ""]
        lines += _grid(not_counted(report))
    return "\n".join(lines) + "\n"


def not_counted(report: Report) -> list[dict[str, str]]:
    """A line for each job that is not in the figures."""
    return [
        {"job": job.name, "row": label, "state": job.state, "reason": _one_line(job.reason)}
        for job, label in report.not_counted
    ]


def title(report: Report) -> str:
    done = len(report.all_jobs)
    what = f"Table {report.table} of the paper, ours beside it" if report.table else "Report"
    return f"{what}: {done} of {done + len(report.not_counted)} jobs"


def cells(report: Report, number: int, row: Row) -> dict[str, str]:
    """One line of the table, by column."""
    of_paper = report.table is not None
    speed, seconds = row.mean(lambda job: job.images_per_sec), row.mean(lambda job: job.seconds)
    found = {
        "#": str(number),
        "row": row.label,
        "seeds": f"{len(row.jobs)}/{row.num_jobs}",
        "top1, last epoch": _interval(row.top1),
        "best epoch": _number(row.mean(lambda job: job.best), "{:.2f}"),
        "difference": "reference" if row.reference is row else _difference(row),
        "excludes 0": _yes_no(row.difference),
    }
    if of_paper:
        found["paper top1"] = f"{row.paper.top1:.1f}" if row.paper else "-"
        found["paper difference"] = _paper_difference(row)
    found["M params"] = "-" if row.params is None else f"{row.params / 1e6:.2f}"
    if of_paper:
        found["paper M"] = f"{row.paper.mparams:.1f}" if row.paper and row.paper.mparams else "-"
    found["GFLOPs"] = "-" if row.flops is None else f"{row.flops / 1e9:.3g}"
    if of_paper:
        found["paper G"] = f"{row.paper.gflops:.1f}" if row.paper else "-"
    found["images/s"] = _number(speed, "{:,.0f}")
    found["training time"] = duration(seconds.mean) if seconds else "-"
    return found


def _grid(rows: list[dict[str, str]]) -> list[str]:
    """Markdown's table, its columns aligned."""
    columns = list(rows[0])
    escaped = [{key: text.replace("|", "\\|") for key, text in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in escaped)) for key in columns}
    lines = ["| " + " | ".join(row[key].ljust(widths[key]) for key in columns) + " |" for row in escaped]
    header = "| " + " | ".join(key.ljust(widths[key]) for key in columns) + " |"
    return [header, "|" + "|".join("-" * (widths[key] + 2) for key in columns) + "|", *lines]


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    if interval.half_width is None:
        return f"{interval.mean:{sign}.2f} (1 seed)"
    return f"{interval.mean:{sign}.2f} ± {interval.half_width:.2f}"


def _difference(row: Row) -> str:
    """With the number of pairs where some seeds have no partner."""
    found = row.difference
    alone = found is not None and 1 < found.n < len(row.jobs)
    return _interval(found, sign="+") + (f" ({found.n} pairs)" if found and alone else "")


def _number(interval: Interval | None, form: str) -> str:
    return form.format(interval.mean) if interval else "-"


def _yes_no(interval: Interval | None) -> str:
    excludes = interval.excludes_zero if interval else None
    return "-" if excludes is None else ("yes" if excludes else "no")


def _paper_difference(row: Row) -> str:
    if row.reference is row and row.paper:
        return "reference"
    return "-" if row.paper_difference is None else f"{row.paper_difference:+.1f}"


def _one_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def notes(report: Report) -> list[str]:
    """What one must know to read the figures."""
    found = ["top1 in percent, of the last epoch (the best epoch is chosen on val, so its figure flatters)"]
    configs = [row.config for row in report.rows if row.config is not None]
    splits = list(dict.fromkeys(split_of(config) for config in configs))
    found.append(f"val is {'; or '.join(splits)}" + ("" if len(splits) == 1 else ": rows differ in it"))
    found.append(
        "± is the 95 % confidence interval of the mean over seeds (Student's t). It covers the seeds alone, not which "
        "images val holds"
    )
    references = list(dict.fromkeys(row.reference.label for row in report.rows if row.reference is not None))
    if references:
        against = references[0] if len(references) == 1 else f"the reference row ({'; '.join(references)})"
        found.append(f"difference: top1 less that of {against}, paired by seed")
    if (num_intervals := sum(row.difference is not None for row in report.rows)) > 2:
        found.append(f"{num_intervals} differences: where none is real, one in twenty intervals still excludes 0")
    counts = {len(row.jobs) for row in report.rows if row.jobs}
    if counts and min(counts) < FEW:
        found.append(
            f"few seeds ({_range(counts)}): the intervals rest on top1 being normally distributed over seeds; one seed "
            "has no interval"
        )
    return found + (_paper_notes(report, configs) if report.table else [])


def _paper_notes(report: Report, configs: list[TrainConfig]) -> list[str]:
    lines = [f"paper: ImageNet, as arXiv 1906.05909 prints it in Table {report.table}"]
    if any(config.data.name != "imagenet" or "50" not in config.model.name for config in configs) and report.table != 1:
        lines[0] += ", ResNet-50; ours is another depth or data set: compare the differences, not the figures"
    elif any(config.data.name != "imagenet" for config in configs):
        lines[0] += "; ours is another data set: compare the differences, not the figures"
    held_out = report.table in HELD_OUT_TABLES
    if any((config.data.holdout_fraction > 0) != held_out for config in configs):
        lines.append(
            "the paper's top1 of this table is on 4 % held out of train, ours is not (data.holdout_fraction=0.04)"
            if held_out
            else "ours is on images held out of train, the paper's top1 of this table is not"
        )
    return lines


def split_of(config: TrainConfig) -> str:
    """What val is, in words."""
    data = config.data
    part = "" if data.max_val_images is None else f", {data.max_val_images:,} images of it at most"
    size = f"{data.name} at {resolved_image_size(data)} pixels"
    if data.holdout_fraction > 0:
        return f"{100 * data.holdout_fraction:g} % held out of train of {size}{part}"
    if data.name == "digits":
        return f"the fixed fifth of {size} that is not trained on{part}"
    return f"the set's own val or test images of {size}{part}"


def _range(counts: set[int]) -> str:
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def as_json(report: Report) -> str:
    """Everything, seed by seed."""
    content = {
        "format_version": 1,
        "commands": report.commands,
        "paper_table": report.table,
        "notes": notes(report),
        "rows": [_record(i, row) | {"runs": _runs(row)} for i, row in enumerate(report.rows, 1)],
        "not_counted": [
            {"job": job.name, "row": label, "state": job.state, "reason": job.reason}
            for job, label in report.not_counted
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def as_csv(report: Report) -> str:
    text = io.StringIO()
    records = [_record(i, row) for i, row in enumerate(report.rows, 1)]
    flat = [record | {"settings": json.dumps(record["settings"])} for record in records]
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _record(number: int, row: Row) -> dict[str, Any]:
    """The row's figures as plain values; None where there is none."""
    return {
        "number": number,
        "row": row.label,
        "settings": row.settings,
        "seeds_done": len(row.jobs),
        "seeds": row.num_jobs,
        **_spread("top1", row.top1),
        **_spread("best_top1", row.mean(lambda job: job.best)),
        "reference": row.reference.label if row.reference else None,
        **_spread("difference", row.difference),
        "difference_seeds": row.difference.n if row.difference else None,
        "difference_excludes_zero": row.difference.excludes_zero if row.difference else None,
        "params": row.params,
        "flops": row.flops,
        "images_per_sec": _mean(row.mean(lambda job: job.images_per_sec)),
        "training_seconds": _mean(row.mean(lambda job: job.seconds)),
        "paper_row": row.paper.label if row.paper else None,
        "paper_top1": row.paper.top1 if row.paper else None,
        "paper_difference": None if row.paper_difference is None else round(row.paper_difference, 1),
        "paper_mparams": row.paper.mparams if row.paper else None,
        "paper_gflops": row.paper.gflops if row.paper else None,
    }


def _spread(name: str, interval: Interval | None) -> dict[str, float | None]:
    return {name: _mean(interval), f"{name}_half_width": interval.half_width if interval else None}


def _mean(interval: Interval | None) -> float | None:
    return interval.mean if interval else None


def _runs(row: Row) -> list[dict[str, Any]]:
    return [
        {"run": job.name, "seed": seed, "top1": job.last, "best_top1": job.best, "epoch": job.val[-1]["epoch"]}
        for seed, job in sorted(row.jobs.items())
    ]
