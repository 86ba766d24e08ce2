"""The jobs to report on, found through the ledgers of sweeps or as individual run folders."""

import functools
import itertools
import os
import shlex
import stat
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_train.config.compose import compose_config
from sasa_train.config.identity import trajectory
from sasa_train.config.keys import TrainConfig, with_values
from sasa_train.config.overrides import as_written, parse_overrides
from sasa_train.config.places import where_trained
from sasa_train.config.saved import load_config_file
from sasa_train.files import LOCK, holder, is_there, read_regular
from sasa_train.paper import VARIED
from sasa_train.refusal import ConfigError, is_of_disk, shorten
from sasa_train.runs.info import ENDED, ends_early, read_info_or_raise
from sasa_train.runs.ledger import Job as LedgerJob
from sasa_train.runs.ledger import read_ledger
from sasa_train.runs.metrics import MAX_LOG, best_row, digest_of, read_metrics
from sasa_train.runs.source import similar_runs
from sasa_train.terminal import some, warn

LOG = "metrics.jsonl", "log_sha256"  # the file, and the entry of run.json with its digest
STATES = dict.fromkeys(ENDED, "done")  # state in run.json -> state in the ledger
MAX_COMPOSED = 200  # jobs that have not begun, apart from their seeds; each takes a tenth of a second
KILLED = "no process runs it; the same command continues it"


@dataclass
class Job:
    """A job of a sweep, or a single run folder. `val` and the fields after it are empty if nothing could be read."""

    name: str
    state: str  # done, or the reason why it does not count: waiting, running, failed, refused, interrupted, pruned, ...
    reason: str = ""
    overrides: dict[str, str] | None = None  # key -> value as written; None if the job is not part of a sweep
    run_dir: Path | None = None
    config: TrainConfig | None = None  # None if the config was refused or is damaged
    val: list[dict[str, Any]] = field(default_factory=list)  # the val rows of metrics.jsonl
    train: list[dict[str, Any]] = field(default_factory=list)  # its train rows
    images_per_sec: float | None = None  # median of the train rows
    seconds: float | None = None  # training time, summed over all restarts
    info: dict[str, Any] = field(default_factory=dict)  # run.json; empty if it cannot be read
    in_ledger: dict[str, Any] | None = None  # the last val row, as a sweep has it
    figure: str = "top1"  # the percentage that is shown and compared: trainer.best_metric, where all jobs share it

    @property
    def seed(self) -> int | None:
        return None if self.config is None else self.config.seed

    @property
    def last(self) -> float:
        """`figure` of the last epoch, in percent."""
        return self.val[-1][self.figure]

    @property
    def best(self) -> float:
        return self.best_row[self.figure]

    @property
    def best_row(self) -> dict[str, Any]:
        found = best_row(self.val, self.config.trainer.best_metric if self.config is not None else self.figure)
        assert found is not None
        return found

    def has(self, figure: str) -> bool:
        """Whether each val row has this percentage; those of earlier versions have no f1_macro, for example."""
        return all(row.get(figure) is not None for row in self.val)


@dataclass
class Found:
    """All jobs in the given folders, and the tables of the paper that their sweeps reproduce."""

    jobs: list[Job] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    paper_tables: set[int] = field(default_factory=set)


def find_jobs(sources: list[Path]) -> Found:
    """Find the jobs in sweep folders, run folders and folders that contain run folders; one given twice counts once.

    Raises:
        ConfigError: a source is none of these, or a ledger cannot be read.
    """
    found = Found()
    for source in {path.resolve(): path for path in _runs_and_sweeps(sources)}.values():
        if ledgers := sorted(source.glob("ledger*.json")):
            _add_sweep(found, source, ledgers)
        else:
            found.jobs.append(_run_job(source))
    unique: dict[Path | int, Job] = {}
    for job in found.jobs:
        unique.setdefault(id(job) if job.run_dir is None else job.run_dir.resolve(), job)
    found.jobs = list(unique.values())
    show_alike(found.jobs)
    return found


def show_alike(jobs: list[Job]) -> None:
    """Have all jobs show the metric that chooses their best evaluation, if they share it, or else top1.

    The loss is no percentage, so that top1 is shown where the loss chooses.
    """
    metrics = {job.config.trainer.best_metric for job in jobs if job.val and job.config is not None} - {"loss"}
    shared = metrics.pop() if len(metrics) == 1 else "top1"
    for job in jobs:
        job.figure = shared if all(each.has(shared) for each in jobs) else "top1"


def _runs_and_sweeps(sources: list[Path]) -> Iterator[Path]:
    for source in sources:
        if is_sweep(source) or is_run(source):
            yield source
        elif inside := sorted(folder for folder in source.glob("*") if is_run(folder) or is_sweep(folder)):
            yield from inside
        elif not os.path.lexists(source):
            raise ConfigError(f"{source}: there is no such folder{similar_runs(source, with_sweeps=True)}")
        else:
            raise ConfigError(
                f"{source}: is not a sweep (with ledger.json), not a run (with config.yaml), and holds no runs; give a "
                "folder that sasa-sweep or sasa-train wrote"
            )


def is_sweep(folder: Path) -> bool:
    return any(folder.glob("ledger*.json"))


def is_run(folder: Path) -> bool:
    return is_there(folder / "config.yaml", stat.S_ISREG)


def _read_ledgers(paths: list[Path]) -> tuple[list[dict[str, Any]], dict[str, LedgerJob]]:
    """Read the ledgers of one sweep, one per worker, and return their headers and jobs.

    If a job is listed in two ledgers, the finished entry takes precedence.

    Raises:
        ConfigError: a ledger cannot be read, is damaged, has another version, or contains an unknown `paper_table`.
    """
    abouts, jobs = [], dict[str, LedgerJob]()
    for path in paths:
        try:
            about, found = read_ledger(path)
        except ConfigError as error:
            raise ConfigError(f"{error}; run the sweep's command again, or give its run folders one by one") from error
        table = about.get("paper_table")
        if table is not None and table not in list(VARIED):
            raise ConfigError(f"{path}: paper_table={table!r} must be one of {', '.join(map(str, VARIED))}, or null")
        abouts.append(about)
        jobs |= {name: job for name, job in found.items() if name not in jobs or job.state == "done"}
    return abouts, jobs


def _add_sweep(found: Found, folder: Path, paths: list[Path]) -> None:
    abouts, jobs = _read_ledgers(paths)
    found.paper_tables |= {about["paper_table"] for about in abouts if about.get("paper_table") is not None}
    commands = [str(about["command"]) for about in abouts if about.get("command")]
    found.commands += [command for command in dict.fromkeys(commands) if command not in found.commands]
    made = [_sweep_job(folder / name, job) for name, job in jobs.items()]
    began_in = next((job.info["directory"] for job in made if "directory" in job.info), None)
    for job in made:  # those that have not begun will be trained where the others were
        if job.config is not None and not job.info:
            job.config = where_trained(job.config, began_in)
    found.jobs += made
    if others := sorted(run.name for run in folder.glob("*") if run.name not in jobs and is_run(run)):
        warn(f"{folder}: left out, as its ledger does not list them: {some(others)}; give their folders to add them")


def _sweep_job(run_dir: Path, planned: LedgerJob) -> Job:
    overrides = dict(text.split("=", 1) for text in planned.overrides)
    job = Job(run_dir.name, planned.state, str(planned.reason or ""), overrides, in_ledger=planned.last)
    if is_run(run_dir):
        _read_run(job, run_dir)
    elif job.state == "done":
        job.state, job.reason = "gone", "done, but its run folder is not there"
    if job.state == "running" and _is_free(run_dir):
        # A job that has just started does not hold its folder yet, but its sweep holds its own.
        locks = run_dir.parent.glob(f"{LOCK}*")
        if all(_is_free(run_dir.parent, lock.name) for lock in locks):
            job.state, job.reason = "killed", KILLED
    if job.config is None:
        job.config = _compose_or_none(planned.overrides)
    else:
        _follow_config(job, job.config, planned.overrides)
    return job


def _follow_config(job: Job, config: TrainConfig, planned: list[str]) -> None:
    """Take a job's overrides from its run's config, and warn of those in the ledger that are not the run's."""
    assert job.overrides is not None
    values, wrong = trajectory(config), []
    with suppress(ConfigError):
        for override in parse_overrides(planned):
            key, given = override.key_or_group, override.value()
            # A run replaces texts such as `auto` and the name of a model; it never replaces numbers.
            is_kept = isinstance(given, int | float) or key in ("optimizer.name", "schedule.name")
            if is_kept and values.get(key) is not None and given != values[key]:
                wrong.append(f"{key}={as_written(given)}, but the run has {as_written(values[key])}")
                job.overrides[key] = as_written(values[key])
    if wrong:
        warn(f"{job.run_dir}: the sweep's ledger says {some(wrong)}; the report follows the run")


def _is_free(folder: Path, lock: str = LOCK) -> bool:
    """Whether no process holds the folder; False if this cannot be told because the lock file is another user's."""
    path = folder / lock
    return not path.exists() or (os.access(path, os.W_OK) and holder(folder, lock) is None)


def _compose_or_none(overrides: list[str]) -> TrainConfig | None:
    """Compose the config of a job that has no run folder; None if it is refused, or after MAX_COMPOSED others."""
    seeds = [text.partition("=")[2] for text in overrides if text.startswith("seed=")]
    if len(seeds) != 1 or not seeds[0].isdecimal():
        return _composed(tuple(overrides))
    config = _composed(tuple(text for text in overrides if not text.startswith("seed=")))
    return None if config is None else with_values(config, {"seed": int(seeds[0])})


@functools.cache
def _composed(overrides: tuple[str, ...]) -> TrainConfig | None:
    if _composed.cache_info().currsize >= MAX_COMPOSED:
        return None
    try:
        return compose_config(overrides, may_import=False)  # the ledger may be another person's
    except ConfigError:
        return None


def _run_job(run_dir: Path) -> Job:
    job = Job(run_dir.resolve().name, "began")  # "." has no name
    _read_run(job, run_dir)
    if job.state != "damaged":
        status = str(job.info.get("status", "began"))
        job.state = STATES.get(status, status)
    if job.state == "running" and _is_free(run_dir):
        job.state, job.reason = "killed", KILLED
    return job


def _read_run(job: Job, run_dir: Path) -> None:
    """Fill in the job's fields from its run folder.

    Raises:
        ConfigError: the disk fails, so that nothing is known about the run.
    """
    job.run_dir = run_dir
    try:
        job.config = load_config_file(run_dir / "config.yaml")
        rows = read_metrics(run_dir / "metrics.jsonl")
        job.info = read_info_or_raise(run_dir)
        job.config = where_trained(job.config, job.info.get("directory"))
    except (ConfigError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{error.filename}: cannot be read ({error.strerror})"
        if is_of_disk(error):
            raise ConfigError(f"{reason}; run the same command once the disk is back, or without this run") from error
        job.state, job.reason = "damaged", reason
        return
    job.val = [row for row in rows if row["split"] == "val"]
    other_config = _changed(job, "config.yaml", "config_sha256") if job.info.get("status") in ENDED else None
    if wrong := other_config or _wrong_end(job):
        name = "config.yaml" if other_config else "metrics.jsonl"
        job.state, job.val = "damaged", []
        job.reason = f"{run_dir}/{name}: {wrong}; to restore it: sasa-train resume={shlex.quote(str(run_dir))}"
        return
    job.train = [row for row in rows if row["split"] == "train"]
    speeds = [row["images_per_sec"] for row in rows if row.get("images_per_sec")]
    job.images_per_sec = statistics.median(speeds) if speeds else None
    job.seconds = job.info.get("seconds") if isinstance(job.info.get("seconds"), int | float) else None


def _changed(job: Job, name: str, key: str) -> str | None:
    """Say that a file is not the one whose digest a run recorded under `key` at its end, or return None."""
    assert job.run_dir is not None
    digest = job.info.get(key)
    text = read_regular(job.run_dir / name, MAX_LOG).decode(errors="replace") if digest else ""
    is_same = digest is None or digest_of(text) == digest
    return None if is_same else "it was changed after the run had ended (its SHA-256 is not the one in run.json)"


def _wrong_end(job: Job) -> str | None:
    """Say that the log of a finished run does not end as the run did, or return None."""
    status = job.info.get("status")
    if not job.val or job.config is None or (job.state != "done" and status not in ENDED):
        return None
    if status == "stopped" and not job.info.get("reason"):
        return "run.json says that a hook stopped the run, but not which"
    row, end, trainer = job.val[-1], job.info.get("last") or job.in_ledger, job.config.trainer
    early = f"its last val row is of epoch {row['epoch']} of {trainer.epochs}, but run.json says that the run finished"
    is_early = status != "stopped" and ends_early(vars(trainer), row)
    if isinstance(end, dict):
        if end.get("step", row["step"]) == row["step"] and end.get("top1") == row["top1"]:
            return early if is_early and "epoch" in end else _changed(job, *LOG)
        return (
            f"its last val row is of step {row['step']} with top1 {row['top1']:.2f}, and by "
            f"{'run.json' if job.info.get('last') else 'the ledger'} the run ended at step {shorten(end.get('step'))} "
            f"with top1 {shorten(end.get('top1'))}"
        )
    if wrong := _changed(job, *LOG):
        return wrong
    if is_early:  # an older version did not record the end
        return early
    if any(before["step"] >= after["step"] for before, after in itertools.pairwise(job.val)):
        return "its val rows are not in order"
    return None
