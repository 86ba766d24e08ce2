"""Jobs that differ in their seed alone are one row: its label, its figures, its difference to a reference row."""

from collections.abc import Callable
from dataclasses import dataclass, field

from sasa_train.config.derived import expected_num_classes, resolved_image_size
from sasa_train.config.keys import NOT_TRAJECTORY, TrainConfig, flatten
from sasa_train.config.overrides import as_written
from sasa_train.paper import ROWS as PAPER_ROWS
from sasa_train.paper import Row as PaperRow
from sasa_train.refusal import ConfigError
from sasa_train.report.beside_paper import paper_reference, paper_row
from sasa_train.report.intervals import Interval, mean_interval
from sasa_train.report.jobs import Job


@dataclass(eq=False)  # rows refer to one another
class Row:
    """`settings` are the keys that differ between the rows, with their values as written."""

    settings: dict[str, str]
    label: str = ""
    jobs: dict[int, Job] = field(default_factory=dict)  # by seed, those that count
    num_jobs: int = 0  # with those that do not
    config: TrainConfig | None = None
    paper: PaperRow | None = None
    reference: "Row | None" = None  # itself, for the reference row
    params: int | None = None
    flops: int | None = None  # of one image, forward

    def mean(self, figure: Callable[[Job], float | None]) -> Interval | None:
        """Over the seeds; None where no job has the figure."""
        values = [value for job in self.jobs.values() if (value := figure(job)) is not None]
        return mean_interval(values) if values else None

    @property
    def top1(self) -> Interval | None:
        """Of the last epoch, in percent."""
        return self.mean(lambda job: job.last)

    @property
    def difference(self) -> Interval | None:
        """top1 above the reference row's, over the seeds that both have; None for the reference itself."""
        return None if self.reference in (None, self) else paired_difference(self, self.reference)

    @property
    def paper_difference(self) -> float | None:
        """The same difference as the paper prints it."""
        if self.reference in (None, self) or self.paper is None or self.reference.paper is None:
            return None
        return self.paper.top1 - self.reference.paper.top1


@dataclass
class Report:
    rows: list[Row]
    not_counted: list[tuple[Job, str]]  # with the label of the row, or ""
    table: int | None  # of the paper
    commands: list[str]

    @property
    def all_jobs(self) -> list[Job]:
        return [job for row in self.rows for job in row.jobs.values()]


def paired_difference(row: Row, reference: Row) -> Interval | None:
    """Seed by seed, so that what a seed does to both cancels out; None where they have no seed in common."""
    seeds = [seed for seed in row.jobs if seed in reference.jobs]
    return mean_interval([row.jobs[seed].last - reference.jobs[seed].last for seed in seeds]) if seeds else None


def build_report(jobs: list[Job], table: int | None, reference: str | None, commands: list[str]) -> Report:
    """Group the jobs, name the rows, choose what each is compared with, count parameters and FLOPs.

    Raises:
        ConfigError: `reference` names no row or several; or there is no job whose settings are known.
    """
    rows, not_counted = _group(jobs, table)
    if not rows:
        reasons = "".join(f"\n  {job.name}: {job.reason}" for job, _ in not_counted)
        raise ConfigError(f"there are no jobs to report on{reasons}")
    _name(rows)
    rows.sort(key=_order)
    _choose_references(rows, reference)
    _count_models(rows)
    return Report(rows, [(job, row.label if row else "") for job, row in not_counted], table, commands)


def _group(jobs: list[Job], table: int | None) -> tuple[list[Row], list[tuple[Job, Row | None]]]:
    by_overrides = all(job.overrides is not None for job in jobs)
    all_settings = [_settings(job, by_overrides) for job in jobs]
    known = [settings for settings in all_settings if settings is not None]
    keys = dict.fromkeys(key for settings in known for key in settings)
    differing = [key for key in keys if len({settings.get(key) for settings in known}) > 1]
    rows: dict[tuple, Row] = {}
    not_counted: list[tuple[Job, Row | None]] = []
    for job, settings in zip(jobs, all_settings, strict=True):
        if settings is None:
            not_counted.append((job, None))
            continue
        shown = {key: settings[key] for key in differing if key in settings}
        row = rows.setdefault(tuple(shown.items()), Row(shown))
        row.num_jobs += 1
        row.config = row.config or job.config
        if (why := _why_not(job, row)) is not None:
            job.state, job.reason = why
            not_counted.append((job, row))
        else:
            row.jobs[job.seed or 0] = job
    for row in rows.values():
        row.paper = paper_row(row.config, table) if row.config and table else None
    return list(rows.values()), not_counted


def _settings(job: Job, by_overrides: bool) -> dict[str, str] | None:
    """What tells a job's row from others: its overrides, or every key that changes what it computes; not the seed."""
    if by_overrides:
        assert job.overrides is not None
        given = job.overrides
    elif job.config is None:
        return None
    else:
        given = {key: as_written(value) for key, value in flatten(job.config).items()}
        if job.config.data.name == "digits":
            given.pop("data.root")
    ignored = NOT_TRAJECTORY - {"data.root"} | {"seed"}
    return {key: value for key, value in sorted(given.items()) if key not in ignored}


def _why_not(job: Job, row: Row) -> tuple[str, str] | None:
    """State and reason of a job that is no part of the mean."""
    if job.state != "done":
        return job.state, job.reason
    if not job.val:
        return "no val", "done, but without an evaluation in metrics.jsonl"
    if job.seed in row.jobs:
        return "repeated", f"has the seed and settings of {row.jobs[job.seed].name}, which counts"
    return None


def _name(rows: list[Row]) -> None:
    """The paper's label where the row is the paper's; where several are, what tells them apart as well."""
    for row in rows:
        same = [other for other in rows if other.paper is row.paper]
        apart = {
            key: value
            for key, value in row.settings.items()
            if row.paper is None or len({other.settings.get(key) for other in same}) > 1
        }
        row.label = ", ".join(([row.paper.label] if row.paper else []) + [f"{k}={v}" for k, v in apart.items()])
        row.label = row.label or "all jobs"


def _order(row: Row) -> tuple:
    """The paper's order; else by settings, numbers as numbers."""
    place = PAPER_ROWS.index(row.paper) if row.paper else len(PAPER_ROWS)
    return (place, [(key, _sortable(value)) for key, value in row.settings.items()])


def _sortable(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)


def _choose_references(rows: list[Row], reference: str | None) -> None:
    if reference is not None:
        chosen = find_row(rows, reference)
        for row in rows:
            row.reference = chosen
        return
    is_papers = any(row.paper for row in rows)
    for row in rows:
        row.reference = _papers_default(row, rows) if is_papers else rows[0]


def _papers_default(row: Row, rows: list[Row]) -> Row | None:
    """Our row that stands for the paper's default: of several, the one most like this row."""
    if row.paper is None:
        return None
    wanted = paper_reference(row.paper)
    candidates = [other for other in rows if other.paper is wanted]
    return max(candidates, key=lambda other: len(other.settings.items() & row.settings.items()), default=None)


def find_row(rows: list[Row], text: str) -> Row:
    """By number (from 1), whole label, or a part that one label alone has.

    Raises:
        ConfigError: none or several.
    """
    if text.isdecimal() and 1 <= int(text) <= len(rows):
        return rows[int(text) - 1]
    found = [row for row in rows if row.label == text] or [row for row in rows if text in row.label]
    if len(found) != 1:
        labels = "\n".join(f"  {i}  {row.label}" for i, row in enumerate(rows, 1))
        how_many = "no row" if not found else f"{len(found)} rows"
        raise ConfigError(f"--reference {text}: names {how_many}; give a number or a label of\n{labels}")
    return found[0]


def _count_models(rows: list[Row]) -> None:
    """Parameters and forward FLOPs of the model that ran, at its image size, counted once where several rows share it.

    Both stay None where the number of classes is not known, or all jobs of the row were refused.
    """
    counted: dict[str, tuple[int, int]] = {}
    for row in rows:
        key = f"{row.config and row.config.model} {row.config and row.config.data}"
        if key not in counted and (found := count_model(row)) is not None:
            counted[key] = found
        row.params, row.flops = counted.get(key, (None, None))


def count_model(row: Row) -> tuple[int, int] | None:
    from sasa_train.models import build_model
    from sasa_train.models.counting import count_flops, count_params, meta_model

    if row.config is None:
        return None
    config, size = row.config.model, resolved_image_size(row.config.data)
    num_classes = expected_num_classes(row.config) or _num_classes_of_runs(row)
    if num_classes is None:
        return None
    try:
        model = meta_model(lambda: build_model(config, num_classes, size))
    except ConfigError:
        return None
    return count_params(model), count_flops(model, size)


def _num_classes_of_runs(row: Row) -> int | None:
    """Of a set of one's own: as the first checkpoint that can be read says."""
    from sasa_train.runs.checkpoint import CheckpointError, load_checkpoint

    for job in row.jobs.values():
        assert job.run_dir is not None
        try:
            return len(load_checkpoint(job.run_dir / "checkpoints/last.pt")["classes"])
        except CheckpointError:
            continue
    return None
