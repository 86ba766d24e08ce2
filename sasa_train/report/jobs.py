"""What ran: the jobs of sweeps (their ledgers beside the run folders), or run folders alone."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_train.config.compose import compose_config
from sasa_train.config.keys import TrainConfig
from sasa_train.config.saved import load_config_file
from sasa_train.paper import VARIED
from sasa_train.refusal import ConfigError
from sasa_train.runs.metrics import read_metrics

LEDGER_VERSION = 1
STATES = {"finished": "done"}  # what run.json calls otherwise than a ledger


@dataclass
class Job:
    """One job of a sweep, or one run folder. `val` and what follows are empty where it left nothing to read."""

    name: str
    state: str  # done, or why it does not count: waiting, running, failed, refused, interrupted, pruned, ...
    reason: str = ""
    overrides: dict[str, str] | None = None  # key -> value as written; None: no sweep's job
    run_dir: Path | None = None
    config: TrainConfig | None = None  # None where it is refused or damaged
    val: list[dict[str, Any]] = field(default_factory=list)  # the val rows of metrics.jsonl
    images_per_sec: float | None = None  # median of the train rows
    seconds: float | None = None  # of training, over all restarts
    info: dict[str, Any] = field(default_factory=dict)  # run.json, empty where it cannot be read

    @property
    def seed(self) -> int | None:
        return None if self.config is None else self.config.seed

    @property
    def last(self) -> float:
        """top1 of the last epoch, in percent."""
        return self.val[-1]["top1"]

    @property
    def best(self) -> float:
        return max(row["top1"] for row in self.val)


@dataclass
class Found:
    """All jobs of the given folders; `paper_table` where one sweep's file names one."""

    jobs: list[Job] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    paper_tables: set[int] = field(default_factory=set)


def find_jobs(sources: list[Path]) -> Found:
    """The jobs of sweep folders, run folders, and folders that hold run folders.

    Raises:
        ConfigError: a source that is none of these, or a ledger that cannot be read.
    """
    found = Found()
    for source in sources:
        if ledgers := sorted(source.glob("ledger*.json")):
            _add_sweep(found, source, [read_ledger(path) for path in ledgers])
        elif is_run(source):
            found.jobs.append(_run_job(source))
        elif inside := sorted(folder for folder in source.glob("*") if is_run(folder) or is_sweep(folder)):
            within = find_jobs(inside)
            found.jobs += within.jobs
            found.commands += within.commands
            found.paper_tables |= within.paper_tables
        else:
            raise ConfigError(
                f"{source}: is no sweep (with ledger.json), no run (with config.yaml) and holds no runs; give what "
                "sasa-sweep or sasa-train wrote"
            )
    return found


def is_sweep(folder: Path) -> bool:
    return any(folder.glob("ledger*.json"))


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def read_ledger(path: Path) -> dict[str, Any]:
    """A sweep's ledger as it was written.

    Raises:
        ConfigError: it cannot be read, is damaged, or of another version.
    """
    remedy = "run the sweep's command again, or give its run folders one by one"
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as a ledger ({error}); {remedy}") from error
    version = ledger.get("format_version") if isinstance(ledger, dict) else None
    if version != LEDGER_VERSION:
        raise ConfigError(f"{path}: is no ledger of format {LEDGER_VERSION} (format_version={version!r}); {remedy}")
    sweep, jobs = ledger.get("sweep"), ledger.get("jobs")
    table = sweep.get("paper_table") if isinstance(sweep, dict) else None
    if table is not None and table not in list(VARIED):
        raise ConfigError(f"{path}: paper_table={table!r} must be one of {', '.join(map(str, VARIED))}, or null")
    if not isinstance(jobs, dict) or not all(_is_entry(entry) for entry in jobs.values()):
        raise ConfigError(f"{path}: is damaged: its jobs are not names with overrides and a state; {remedy}")
    return ledger


def _is_entry(entry: Any) -> bool:
    overrides = entry.get("overrides") if isinstance(entry, dict) else None
    is_list = isinstance(overrides, list) and all(isinstance(o, str) and "=" in o for o in overrides)
    return is_list and isinstance(entry.get("state"), str)


def _add_sweep(found: Found, folder: Path, ledgers: list[dict[str, Any]]) -> None:
    """One ledger, or those of several workers: of a job that two of them know, the one that has it done."""
    entries: dict[str, dict[str, Any]] = {}
    for ledger in ledgers:
        sweep = ledger.get("sweep")
        sweep = sweep if isinstance(sweep, dict) else {}
        if (table := sweep.get("paper_table")) is not None:
            found.paper_tables.add(table)
        if (command := sweep.get("command")) and command not in found.commands:
            found.commands.append(str(command))
        for name, entry in ledger["jobs"].items():
            if name not in entries or entry["state"] == "done":
                entries[name] = entry
    found.jobs += [_sweep_job(folder / name, entry) for name, entry in entries.items()]


def _sweep_job(run_dir: Path, entry: dict[str, Any]) -> Job:
    overrides = dict(text.split("=", 1) for text in entry["overrides"])
    job = Job(run_dir.name, entry["state"], str(entry.get("reason") or ""), overrides)
    if is_run(run_dir):
        _read_run(job, run_dir)
    elif job.state == "done":
        job.state, job.reason = "gone", "done, but its run folder is not there"
    if job.config is None:
        job.config = _compose_or_none(entry["overrides"])
    return job


def _compose_or_none(overrides: list[str]) -> TrainConfig | None:
    try:
        return compose_config(overrides)
    except ConfigError:
        return None


def _run_job(run_dir: Path) -> Job:
    job = Job(run_dir.resolve().name, "began")  # "." has none
    _read_run(job, run_dir)
    if job.state != "damaged":
        status = str(job.info.get("status", "began"))
        job.state = STATES.get(status, status)
    return job


def _read_run(job: Job, run_dir: Path) -> None:
    """Fill in what the folder holds."""
    job.run_dir = run_dir
    try:
        job.config = load_config_file(run_dir / "config.yaml")
        rows = read_metrics(run_dir / "metrics.jsonl")
    except ConfigError as error:
        job.state, job.reason = "damaged", str(error)
        return
    job.val = [row for row in rows if row["split"] == "val"]
    speeds = [row["images_per_sec"] for row in rows if row.get("images_per_sec")]
    job.images_per_sec = statistics.median(speeds) if speeds else None
    try:
        info = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    job.info = info if isinstance(info, dict) else {}
    job.seconds = job.info.get("seconds") if isinstance(job.info.get("seconds"), int | float) else None
