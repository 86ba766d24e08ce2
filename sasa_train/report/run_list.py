"""The runs of a folder, one line each, the best of each data set first (`sasa-report --list`)."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator

from sasa_train.config.differences import commonest, differing, short, shown_keys
from sasa_train.config.groups import GROUPS
from sasa_train.config.keys import PLACES
from sasa_train.config.places import real
from sasa_train.report.intervals import exactness, mean_interval
from sasa_train.report.jobs import Job
from sasa_train.terminal import printable

MIN_NAME = 20  # characters of a run's name that are shown even if the terminal is narrow


def list_runs(jobs: list[Job], width: int | None = None) -> str:
    """Return a table of the runs for each data set, for a terminal of `width` columns (default: this one's).

    The runs are sorted by the top1 of their last evaluation. Columns show the keys that differ within the table.
    """
    width = width or shutil.get_terminal_size((80, 24)).columns
    parts = []
    for data, group in group_by_data(jobs):
        parts += ["", data, *_table(group, width)]
        if (best := best_of(group)) is not None and best.run_dir is not None:
            checkpoint = printable(shlex.quote(str(best.run_dir / "checkpoints/last.pt")))
            parts.append(f"{mark_of(group)}  sasa-evaluate {checkpoint}")
            if best.figure == "top1" and (num_images := best.info.get("num_val_images")):
                most = best.config.data.max_val_images if best.config is not None else None
                parts.append(exactness(best.last, min(num_images, most or num_images)))
        if any(job.state == "killed" for job in group):
            parts.append("killed: no process runs it; the same command, or sasa-train resume=RUN, continues it")
    return "\n".join(parts[1:])


def group_by_data(jobs: list[Job]) -> Iterator[tuple[str, list[Job]]]:
    """Yield each data set and its jobs, by top1 of the last evaluation; those without an evaluation come last."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault(_data(job), []).append(job)
    names = [_name(data, found) for data, found in groups.items()]
    shown = [name if names.count(name) == 1 else "  ".join(data) for name, data in zip(names, groups, strict=True)]
    for _, name, found in sorted(zip(names, shown, groups.values(), strict=True), key=lambda entry: entry[:2]):
        yield printable(name), sorted(found, key=lambda job: (-job.last if job.val else 1.0, job.name))


def best_of(group: list[Job]) -> Job | None:
    """Return the finished job with the highest top1 of its last epoch from a sorted group of several; None without."""
    return next((job for job in group if job.val and job.state == "done"), None) if len(group) > 1 else None


def mark_of(group: list[Job]) -> str:
    """Return "best" if chance in the seeds does not explain that the runs like the best one are above the next."""
    rows: dict[str, dict[int, float]] = {}  # by all keys but the seed
    for job in group:
        if job.val and job.state == "done" and job.config is not None:
            keys = _keys(job) | {"seed": ""}
            rows.setdefault(str(sorted(keys.items())), {}).setdefault(job.config.seed, job.last)
    found = sorted(rows.values(), key=lambda row: -sum(row.values()) / len(row))
    best = best_of(group)
    if best is None or len(found) < 2 or best.last not in found[0].values():
        return "highest"
    leads = [top1 - found[1][seed] for seed, top1 in found[0].items() if seed in found[1]]
    lead = mean_interval(leads) if leads else None
    return "best" if lead is not None and lead.is_shown and lead.excludes_zero and lead.mean > 0 else "highest"


def _data(job: Job) -> tuple[str, str]:
    """Return the kind of a job's data set and what tells it from others of the kind: the real path of its images."""
    if job.config is None:
        return "config unknown", ""
    data = job.config.data
    key, _, place = data.place.partition("=")
    return data.name, "" if data.name == "digits" else real(place) if key in PLACES else place


def _name(data: tuple[str, str], found: list[Job]) -> str:
    """Return the name of a data set, with its folder, list or function as the first of its jobs names it."""
    kind, place = data
    if not place or found[0].config is None:
        return kind
    key, _, written = found[0].config.data.place.partition("=")
    return f"{kind}  {os.path.basename(os.path.abspath(written)) if key in PLACES else place}"


def _table(jobs: list[Job], width: int) -> Iterator[str]:
    """Yield the lines of one table: top1, best top1, the epoch, the name, what is not done, and what differs.

    Where the keys that differ have no room for a column each, one column names what a run has in place of the
    commonest values, the best top1 is left out, and if even that is too wide, some of the keys are.
    """
    columns = columns_of(jobs)
    left_out, min_name = 0, min(MIN_NAME, max(len(printable(job.name)) for job in jobs))
    if width - _width(columns) < min_name:
        columns = [column for column in columns if column[0] != "best"]  # the last epoch decides
        num_fixed = 3 if columns[2:] and columns[2][0] == "state" else 2
        together = [*columns[:num_fixed], ["differs in", *_differences(columns[num_fixed:], len(jobs))]]
        if width - _width(columns) < min_name <= width - _width(together):
            columns = together
        while len(columns) > num_fixed and width - _width(columns) < min_name:
            del columns[-1]
            left_out += 1
    room = max(min_name, width - _width(columns))
    place = 1 + next(place for place, column in enumerate(columns) if column[0] == "epoch")
    columns.insert(place, ["run", *(_shortened(printable(job.name), room) for job in jobs)])
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        numbers = [text.rjust(size) for text, size in zip(line[:place], widths[:place], strict=True)]
        yield "  ".join(numbers + [t.ljust(n) for t, n in zip(line[place:], widths[place:], strict=True)]).rstrip()
    if left_out:
        keys = "key differs" if left_out == 1 else "keys differ"
        yield f"({left_out} more {keys}; a wider terminal shows more)"


def _differences(columns: list[list[str]], num_runs: int) -> Iterator[str]:
    """Yield each run's values of the keys in `columns`, apart from the commonest ones; "base" if it has only these."""
    usual = [commonest(values) for _, *values in columns]
    for i in range(1, num_runs + 1):
        apart = [
            f"{column[0]}={column[i]}" for column, value in zip(columns, usual, strict=True) if [column[i]] != value
        ]
        yield ", ".join(apart) or "base"


def columns_of(jobs: list[Job]) -> list[list[str]]:
    """Return the columns of a table without the names of the runs, each with its heading first.

    The keys that a command sets come first, and those that all runs chose from their images last.
    """
    keys, named = [_keys(job) for job in jobs], {key for job in jobs for key in _named(job)}
    chosen = set.intersection(*({*job.config.derive} if job.config is not None else set() for job in jobs))
    keys = [{key: value for key, value in run.items() if key != "trainer.epochs"} for run in keys]  # beside the epoch
    found = sorted(differing(keys), key=lambda pair: (pair[0] not in named, pair[0] in chosen))
    columns = [
        [jobs[0].figure, *(f"{job.last:.2f}" if job.val else "-" for job in jobs)],
        ["best", *(f"{job.best:.2f}" if job.val else "-" for job in jobs)],
        ["epoch", *map(_epoch, jobs)],
        *([short(key), *values] for key, values in found),
    ]
    if any(job.state != "done" for job in jobs):
        columns.insert(3, ["state", *(job.state for job in jobs)])
    return columns


def _width(columns: list[list[str]]) -> int:
    """Return the width of the columns and the spaces between them and the column of names."""
    return sum(max(map(len, column)) + 2 for column in columns)


def _keys(job: Job) -> dict[str, str]:
    """Return the values of a job's keys that affect what it computes.

    Of a job without a run folder, only those that its command sets: the run may derive others from its images.
    """
    if job.config is None:
        return {}
    keys = shown_keys(job.config)
    if job.run_dir is not None:
        return keys
    given = {"model.name" if key == "model" else key: value for key, value in (job.overrides or {}).items()}
    return {key: printable(value) for key, value in given.items() if key in keys}


def _named(job: Job) -> set[str]:
    """Return the keys that a job's command sets; a group as the key of its name."""
    words = [f"{key}=" for key in job.overrides or ()]
    with contextlib.suppress(ValueError):  # a command that was edited
        words += shlex.split(str(job.info.get("command", "")))
    keys = {key for key, has_value, _ in (word.partition("=") for word in words) if has_value}
    return {f"{key}.name" if key in GROUPS else key for key in keys} | keys


def _epoch(job: Job) -> str:
    if job.run_dir is None:
        return "-"
    planned = f"/{job.config.trainer.epochs}" if job.config else ""
    return f"{job.val[-1]['epoch'] if job.val else 0}{planned}"


def _shortened(name: str, room: int) -> str:
    """Shorten a name in its middle: its end, with the hash of the config, tells runs apart."""
    return name if len(name) <= room else f"{name[: room - 12]}...{name[-9:]}"
