"""The ledger of a sweep, a JSON file with each job's overrides, state, tries, end reason and metrics."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_train.config.keys import BEST_METRICS
from sasa_train.config.saved import load_config_file
from sasa_train.files import FolderLock, is_there, kind, read_regular, write_atomic
from sasa_train.machine import now
from sasa_train.refusal import ConfigError, ExpectedFailure, shorten
from sasa_train.runs.info import has_finished
from sasa_train.runs.metrics import PERCENT, best_row, read_metrics, score
from sasa_train.runs.schema import MAX_SECONDS, PLAIN, TEXT, Maybe, Rule, first_wrong, number, whole
from sasa_train.terminal import INTERRUPTED, REFUSED, warn

FORMAT_VERSION = 1
FINISHED = "finished"
STATES = ("waiting", "running", "done", "interrupted", "failed", "refused", "pruned")
COUNT = whole(0)
ROW: dict[Any, Any] = {
    "top1": PERCENT,
    "epoch": COUNT,
    "step": COUNT,
    **dict.fromkeys(("top5", "f1_macro", "balanced_accuracy"), Maybe((None, PERCENT))),
    "loss": (None, number()),
    str: PLAIN,
}
SECONDS = (None, number(0, MAX_SECONDS))
TRY = {"started": TEXT, "seconds": SECONDS, "exit_code": (None, whole(-255, 255)), "reason": TEXT, str: PLAIN}
# The fields of a Job, whose defaults apply to missing entries.
JOB: dict[str, Any] = {
    "overrides": [Rule("a text with =", lambda text: TEXT.holds(text) and "=" in text)],
    "label": Maybe(TEXT),
    "epochs": Maybe(COUNT),
    "metric": Maybe(Rule(f"one of {', '.join(BEST_METRICS)}", lambda metric: metric in BEST_METRICS)),
    "state": Maybe(Rule(f"one of {', '.join(STATES)}", lambda state: state in STATES)),
    "reason": Maybe(TEXT),
    "tries": Maybe([TRY]),
    "best": Maybe((None, ROW)),
    "last": Maybe((None, ROW)),
    "trials": Maybe([COUNT]),
}
LEDGER = {
    "format_version": Rule(str(FORMAT_VERSION), lambda version: type(version) is int and version == FORMAT_VERSION),
    "sweep": Maybe(dict),
    "jobs": {str: JOB},
}


@dataclass
class Job:
    """A planned run and its history; `overrides` are passed to sasa-train and determine the run folder's name.

    `best` is the best evaluation by `metric`, the run's trainer.best_metric, and `last` is the newest one.

    state: waiting (to start or restart), running, done, interrupted (stopped before its end; the same command continues
    it), failed (sweep.max_tries times in a row), refused (because of its config or data; tried once per command),
    pruned (stopped early by a search).
    """

    name: str
    overrides: list[str]
    label: str = ""  # how it differs from the sweep's other jobs
    epochs: int = 0
    metric: str = "top1"
    state: str = "waiting"
    reason: str = ""
    tries: list[dict[str, Any]] = field(default_factory=list)  # started, seconds, exit_code, reason
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    trials: list[int] = field(default_factory=list)  # in a search: the numbers of the trials with this config

    def begin(self) -> None:
        self.state, self.reason = "running", ""
        self.tries.append({"started": now(), "seconds": None, "exit_code": None, "reason": "running"})

    def end(self, state: str, reason: str, exit_code: int | None = None, seconds: float | None = None) -> None:
        self.state, self.reason = state, reason
        if self.tries and self.tries[-1]["reason"] == "running":
            self.tries[-1] |= {"seconds": seconds and round(seconds, 1), "exit_code": exit_code, "reason": reason}

    @property
    def score(self) -> float:
        """The last evaluation's `metric`, negative for the loss, so that the highest is the best; -inf without one."""
        return score(self.last, self.metric) if self.last else -math.inf

    def failures_in_a_row(self) -> int:
        """Count the failed tries since the last try that was stopped, refused or finished."""
        count = 0
        for one in reversed(self.tries):
            if one["exit_code"] in (None, REFUSED, INTERRUPTED) or one["reason"] == FINISHED:
                break
            count += 1
        return count

    def note_metrics(self, run_dir: Path) -> bool:
        """Update `best` and `last` from the run's metrics.jsonl; return whether there is a new evaluation."""
        rows: list[dict[str, Any]] = [
            {key: row.get(key) for key in (*BEST_METRICS, "top5", "step", "epoch")}
            for row in read_metrics(run_dir / "metrics.jsonl", skip_damaged=True)
            if row["split"] == "val"
        ]
        if not rows or rows[-1] == self.last:
            return False
        self.last, self.best = rows[-1], best_row(rows, self.metric)
        if not self.epochs:  # the run chose them from its images
            with contextlib.suppress(ConfigError):
                self.epochs = load_config_file(run_dir / "config.yaml").trainer.epochs
        return True


class Ledger:
    """The jobs of a sweep, in the order in which they were first requested; call `save` after each change.

    lock: the sweep folder's, or None if nobody else can write there.
    """

    def __init__(self, path: Path, about: dict[str, Any], lock: FolderLock | None = None):
        self.path, self.about, self.lock = path, about, lock
        self.asked: set[str] = set()  # names of this command's jobs; the ledger may contain others
        try:
            known = read_ledger(path)[1] if is_there(path) else {}
        except DamagedLedgerError as error:
            aside, known = path.with_name(f"{path.name}.damaged"), {}
            if os.path.lexists(aside) and (found := kind(aside)) == "a folder":
                raise ConfigError(f"{error}; it cannot be kept as {aside}, which is {found}: move that away") from error
            path.replace(aside)
            warn(f"{error}; it is kept as {aside.name}, and what is done is read from the run folders")
        self.jobs = {job.name: job for job in known.values() if job.tries or job.state != "refused"}
        for job in self.jobs.values():
            if job.state == "running":  # the sweep was killed, and its jobs were told to save and stop
                job.end("interrupted", "the sweep ended before it did")

    def add(self, planned: Job) -> Job:
        """Return the job with its history; mark it refused if its config is invalid, or done if its run finished."""
        job = self.jobs.setdefault(planned.name, planned)
        self.asked.add(job.name)
        job.overrides, job.label, job.epochs = planned.overrides, planned.label, planned.epochs
        job.metric = planned.metric
        run_dir = self.path.parent / job.name
        if planned.state == "refused":
            job.end("refused", planned.reason)
        elif has_finished(run_dir, job.overrides):
            job.note_metrics(run_dir)  # also of a job that is done: the run tells what it reached, not the ledger
            if job.state != "done":
                job.end("done", FINISHED)
        return job

    def asked_for(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.name in self.asked]

    def save(self) -> None:
        """Write the ledger; if the disk is full, only warn, because the next save will contain everything.

        Raises:
            ExpectedFailure: the folder is not this sweep's any more.
        """
        jobs = {name: {k: v for k, v in vars(job).items() if k != "name"} for name, job in self.jobs.items()}
        content = {"format_version": FORMAT_VERSION, "sweep": self.about, "jobs": jobs}
        try:
            if self.lock is not None and not self.lock.holds(self.path.parent):
                raise ExpectedFailure(
                    f"{self.path.parent}: its lock file is gone or another's; the folder was moved, deleted or taken "
                    "by another sweep. This sweep stops without writing, and its jobs save and stop"
                )
            write_atomic(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            warn(f"{self.path} cannot be written ({error.strerror}); the jobs go on, and the next change is written")


class DamagedLedgerError(ConfigError):
    """Raised if the file is not a ledger written by a sweep."""


def read_ledger(path: Path) -> tuple[dict[str, Any], dict[str, Job]]:
    """Return a sweep's description (for example, its command) and its jobs by name.

    Raises:
        DamagedLedgerError: the file is not a ledger written by a sweep.
        ConfigError: the file cannot be read or has another format version.
    """
    try:
        content = json.loads(read_regular(path))
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise ConfigError(f"{path}: is not a ledger of format {FORMAT_VERSION} (format_version={version!r})")
        if wrong := first_wrong(content, LEDGER) or _first_other_folder(content["jobs"]):
            raise ValueError(wrong)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a ledger ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedLedgerError(f"{path}: is damaged, and cannot be read as a ledger ({error})") from error
    found = content["jobs"].items()
    return content.get("sweep", {}), {
        name: Job(name, **{k: v for k, v in job.items() if k in JOB}) for name, job in found
    }


def _first_other_folder(names: Iterable[str]) -> str | None:
    """Describe the first name that is not a folder in the sweep's folder, or return None."""
    wrong = next((name for name in names if not re.fullmatch(r"[\w,=+-][\w.,=+-]{0,199}", name, re.ASCII)), None)
    return None if wrong is None else f"jobs: {shorten(wrong)!r} must be the name of a run folder in the sweep's"
