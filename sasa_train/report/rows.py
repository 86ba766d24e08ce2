"""The rows of the report: each groups jobs that differ only in their seed and is compared with a reference row."""

from dataclasses import dataclass, field

from sasa_train.config.derived import expected_num_classes, input_size
from sasa_train.config.differences import commonest, of_presets, shown_keys
from sasa_train.config.keys import NOT_TRAJECTORY, PLACES, TrainConfig
from sasa_train.config.overrides import TEXT_KEYS, as_written
from sasa_train.config.places import places, real
from sasa_train.paper import ROWS as PAPER_ROWS
from sasa_train.paper import Row as PaperRow
from sasa_train.paper import matching_row, reference_row
from sasa_train.refusal import ConfigError
from sasa_train.report.intervals import Interval, mean_interval
from sasa_train.report.jobs import Job


@dataclass(eq=False)  # rows refer to one another
class Row:
    """A row of the report; `settings` maps the keys that differ between rows to their values as written."""

    settings: dict[str, str]
    label: str = ""
    jobs: dict[int, Job] = field(default_factory=dict)  # by seed, excluding jobs that do not count
    num_jobs: int = 0  # total, including jobs that do not count
    config: TrainConfig | None = None
    is_base: bool = False  # the row from which the others differ
    paper: PaperRow | None = None
    reference: "Row | None" = None  # the reference row refers to itself
    params: int | None = None
    flops: int | None = None  # for a forward pass on one image
    num_classes: int | None = None

    def mean(self, figure: str) -> Interval | None:
        """Return the mean of the jobs' `last`, `best`, `images_per_sec` or `seconds`; None if no job has a value."""
        values = [value for job in self.jobs.values() if (value := getattr(job, figure)) is not None]
        return mean_interval(values) if values else None

    @property
    def last(self) -> Interval | None:
        """The mean of the jobs' figure (see `Job`), mostly top1, after the last epoch, in percent."""
        return self.mean("last")

    @property
    def difference(self) -> Interval | None:
        """The difference in `last` from the reference row over their common seeds; None for the reference row."""
        return None if self.reference in (None, self) else paired_difference(self, self.reference)

    @property
    def paper_difference(self) -> float | None:
        """The difference in top1 from the reference row according to the paper."""
        if self.reference in (None, self) or self.paper is None or self.reference.paper is None:
            return None
        return self.paper.top1 - self.reference.paper.top1


@dataclass
class Report:
    rows: list[Row]
    not_counted: list[tuple[Job, str]]  # each with the label of its row, or ""
    table: int | None  # number of the paper's table
    commands: list[str]
    common: dict[str, str] = field(default_factory=dict)  # keys and their commonest values, which no label names
    x: str | None = None  # the cost that --x asks for
    val_note: str = ""  # what the number of val images means for top1

    @property
    def all_jobs(self) -> list[Job]:
        return [job for row in self.rows for job in row.jobs.values()]

    @property
    def figure(self) -> str:
        """The percentage that is shown and compared, mostly top1."""
        return figure_of(self.rows)

    @property
    def has_intervals(self) -> bool:
        """Whether any row has enough seeds for an interval."""
        return any(row.last is not None and row.last.is_shown for row in self.rows)


def figure_of(rows: list[Row]) -> str:
    """Return the percentage that the jobs of all rows show, mostly top1."""
    return next((job.figure for row in rows for job in row.jobs.values()), "top1")


def paired_difference(row: Row, reference: Row) -> Interval | None:
    """Compare two rows seed by seed, which cancels the effect of the seed; return None if they share no seed."""
    differences = _by_seed(row, reference)
    return mean_interval(differences) if differences else None


def seed_differences(row: Row) -> list[float]:
    """Return the differences whose mean is `row.difference`, one for each seed; empty for a reference row."""
    return [] if row.reference in (None, row) else _by_seed(row, row.reference)


def _by_seed(row: Row, reference: Row) -> list[float]:
    return [job.last - reference.jobs[seed].last for seed, job in row.jobs.items() if seed in reference.jobs]


def build_report(jobs: list[Job], table: int | None, reference: str | None, commands: list[str]) -> Report:
    """Group the jobs into rows, label the rows, choose their references, and count parameters and FLOPs.

    Raises:
        ConfigError: `reference` matches no row or several rows, or the settings of all jobs are unknown.
    """
    rows, not_counted = _group(jobs, table)
    if not rows:
        reasons = "".join(f"\n  {job.name}: {job.reason}" for job, _ in not_counted)
        raise ConfigError(f"there are no jobs to report on{reasons}")
    common = _name(rows)
    first = next((row for row in rows if row.is_base), rows[0])
    rows.sort(key=_order)
    _choose_references(rows, reference, first)
    _count_models(rows)
    return Report(rows, [(job, row.label if row else "") for job, row in not_counted], table, commands, common)


def _group(jobs: list[Job], table: int | None) -> tuple[list[Row], list[tuple[Job, Row | None]]]:
    by_overrides = all(job.overrides is not None for job in jobs)
    written: dict[str, str] = {}
    all_settings = [_settings(job, by_overrides, written) for job in jobs]
    known = [settings for settings in all_settings if settings is not None]
    keys = {key: [s.get(key) for s in known] for key in dict.fromkeys(key for s in known for key in s)}
    differing = {key: values for key, values in keys.items() if len(set(values)) > 1}
    differing = differing if by_overrides else of_presets(differing)
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
        row.paper = matching_row(vars(row.config.model), table) if row.config and table else None
    return list(rows.values()), not_counted


def _settings(job: Job, by_overrides: bool, written: dict[str, str]) -> dict[str, str] | None:
    """Return the settings that define a job's row, without the seed: its overrides or all keys that affect results.

    written: real path -> as the first job writes it; the paths of the images are told apart by the former.
    """
    if by_overrides:
        assert job.overrides is not None
        given = {key: _as_number(value) if key not in TEXT_KEYS else value for key, value in job.overrides.items()}
    elif job.config is None:
        return None
    else:
        given = settings_of(job.config)
    for key, path in places(job.config.data).items() if job.config is not None else ():
        if key in given:
            given[key] = written.setdefault(real(path), given[key] if by_overrides else as_written(path))
    ignored = NOT_TRAJECTORY - PLACES | {"seed"}
    return {key: value for key, value in sorted(given.items()) if key not in ignored}


def settings_of(config: TrainConfig) -> dict[str, str]:
    """Return the keys that affect a run's results, as written, with the real paths of its images."""
    return shown_keys(config) | {key: as_written(real(path)) for key, path in sorted(places(config.data).items())}


def _as_number(value: str) -> str:
    """Write a number with a point or an exponent as config.yaml does, so that 1e-1 and 0.10 are the same row."""
    try:
        return as_written(float(value)) if set(value) & set(".eE") else value
    except ValueError:
        return value


def _why_not(job: Job, row: Row) -> tuple[str, str] | None:
    """Return the state and reason of a job that is excluded from the mean, or None if the job counts."""
    if job.state != "done":
        return job.state, job.reason
    if not job.val:
        return "no val", "done, but without an evaluation in metrics.jsonl"
    if job.seed in row.jobs:
        return "repeated", f"has the seed and settings of {row.jobs[job.seed].name}, which counts"
    return None


def _name(rows: list[Row]) -> dict[str, str]:
    """Label the rows with the paper's label, if there is one, and what differs from the commonest value of each key.

    Return the commonest values that no label names. In a sweep's list, the row without changes has no settings.
    """
    common: dict[str, str] = {}
    for papers in {id(row.paper): row.paper for row in rows}.values():
        same = [row for row in rows if row.paper is papers]
        usual = _commonest(same)
        common |= {key: value for key, value in usual.items() if value is not None}
        for row in same:
            keys = dict.fromkeys([*row.settings, *(key for key, value in usual.items() if value is not None)])
            apart = [key for key in keys if key not in usual or row.settings.get(key) != usual[key]]
            if papers is not None:
                apart = [key for key in apart if len({other.settings.get(key) for other in same}) > 1]
            row.is_base = not apart and len(same) > 1
            parts = [papers.label] if papers else ["base"] if row.is_base else []
            row.label = ", ".join([*parts, *(f"{key}={_setting(row, key)}" for key in apart)]) or "all jobs"
    return common


def _commonest(rows: list[Row]) -> dict[str, str | None]:
    """Return the commonest value of each key that has one; None: most rows do not set the key."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    if any(not row.settings for row in rows):
        return dict.fromkeys(keys)
    found = {key: commonest([row.settings.get(key) for row in rows]) for key in keys}
    return {key: values[0] for key, values in found.items() if values}


def _setting(row: Row, key: str) -> str:
    """Return a row's value of a key, which its config has where the job does not set it."""
    of_config = shown_keys(row.config) if row.config else {}
    return row.settings.get(key) or of_config.get(key) or of_config.get(f"{key}.name") or "default"


def _order(row: Row) -> tuple:
    """Return the sort key: the paper's order, then the base, then the settings, with numbers in numerical order."""
    place = PAPER_ROWS.index(row.paper) if row.paper else len(PAPER_ROWS)
    return (place, not row.is_base, [(key, _sortable(value)) for key, value in row.settings.items()])


def _sortable(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)


def _choose_references(rows: list[Row], reference: str | None, first: Row) -> None:
    """Set each row's reference: the requested row, else the paper's default, else `first`."""
    chosen = find_row(rows, reference) if reference is not None else None
    if chosen is None and not any(row.paper for row in rows):
        chosen = first
    for row in rows:
        row.reference = chosen or _papers_default(row, rows)


def _papers_default(row: Row, rows: list[Row]) -> Row | None:
    """Return the row that matches the paper's default; if there are several, the one most similar to `row`."""
    candidates = [other for other in rows if row.paper and other.paper is reference_row(row.paper)]
    return max(candidates, key=lambda other: len(other.settings.items() & row.settings.items()), default=None)


def find_row(rows: list[Row], text: str) -> Row:
    """Find a row by its number (from 1), its label, or a substring that occurs in only one label.

    Raises:
        ConfigError: no row or more than one row matches.
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
    """Count the parameters and forward FLOPs of each row's model at its image size, once per distinct model.

    Both counts remain None if the number of classes is unknown or if all jobs of the row were refused.
    """
    counted: dict[str, tuple[int, int, int] | None] = {}
    for row in rows:
        if row.config is not None:
            key = f"{row.config.model} {row.config.data}"
            found = counted[key] = counted.get(key) or _count_model(row.config, list(row.jobs.values()))
            row.params, row.flops, row.num_classes = found or (None, None, None)


def _count_model(config: TrainConfig, jobs: list[Job]) -> tuple[int, int, int] | None:
    from sasa_train.models import build_model
    from sasa_train.models.counting import count_forward, count_params, meta_model

    num_classes, size = expected_num_classes(config) or _num_classes_of(jobs), input_size(config.data)
    if num_classes is None:
        return None
    try:
        model = meta_model(lambda: build_model(config.model, num_classes, size))
        return count_params(model), count_forward(config.model, num_classes, size), num_classes
    except ConfigError:
        return None


def _num_classes_of(jobs: list[Job]) -> int | None:
    """Return the number of classes in a user's own data set, read from the first readable checkpoint."""
    from sasa_train.runs.checkpoint import CheckpointError, load_checkpoint

    for job in jobs:
        assert job.run_dir is not None
        try:
            return len(load_checkpoint(job.run_dir / "checkpoints/last.pt")["classes"])
        except CheckpointError:
            continue
    return None
