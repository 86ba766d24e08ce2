"""A sweep's ledger: each job's overrides, state, tries, why it ended, and its metrics. One JSON file, written whole."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_train.files import write_atomic
from sasa_train.machine import now
from sasa_train.refusal import ConfigError
from sasa_train.sweep.planning import Job
from sasa_train.terminal import INTERRUPTED, REFUSED, warn

FORMAT_VERSION = 1
FINISHED = "finished"


@dataclass
class Entry:
    """One job. `best` and `last` are the evaluation with the highest top1, and the newest.

    state: waiting (to be started, perhaps again), running, done, interrupted (stopped in between: the same command goes
    on with it), failed (as often in a row as sweep.max_tries), refused (its config or its data; each command tries it
    once), pruned (a search gave it up).
    """

    name: str
    overrides: list[str]
    label: str
    epochs: int = 0
    state: str = "waiting"
    reason: str = ""
    tries: list[dict[str, Any]] = field(default_factory=list)  # started, seconds, exit_code, reason
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    trials: list[int] = field(default_factory=list)  # of a search: the numbers of those that it stands for

    def begin(self) -> None:
        self.state, self.reason = "running", ""
        self.tries.append({"started": now(), "seconds": None, "exit_code": None, "reason": "running"})

    def end(self, state: str, reason: str, exit_code: int | None = None, seconds: float | None = None) -> None:
        self.state, self.reason = state, reason
        if self.tries and self.tries[-1]["reason"] == "running":
            self.tries[-1] |= {"seconds": seconds and round(seconds, 1), "exit_code": exit_code, "reason": reason}

    def failures_in_a_row(self) -> int:
        """Tries that ended by themselves and not well, since the last that was stopped or got to the end."""
        count = 0
        for one in reversed(self.tries):
            if one["exit_code"] in (None, REFUSED, INTERRUPTED) or one["reason"] == FINISHED:
                break
            count += 1
        return count


class Ledger:
    """The jobs of a sweep in the order in which they were first asked for; `save` after each change."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about = path, about
        self.entries: dict[str, Entry] = {}
        self.asked: set[str] = set()  # names of the jobs that this command is about; the ledger may know others
        if path.exists():
            self.entries = {entry.name: entry for entry in _read(path) if entry.tries or entry.state != "refused"}
        for entry in self.entries.values():
            if entry.state == "running":  # the sweep was killed; its jobs were then told to save and stop
                entry.end("interrupted", "the sweep ended before it did")

    def add(self, job: Job) -> Entry:
        """The job's entry, as it was or new."""
        if job.name not in self.entries:
            self.entries[job.name] = Entry(job.name, job.overrides, job.label)
        entry = self.entries[job.name]
        self.asked.add(job.name)
        entry.overrides, entry.label, entry.epochs = job.overrides, job.label, job.epochs
        return entry

    def asked_for(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.name in self.asked]

    def save(self) -> None:
        """Write it; a full disk does not end the jobs: the next save has everything."""
        jobs = {name: {k: v for k, v in vars(e).items() if k != "name"} for name, e in self.entries.items()}
        content = {"format_version": FORMAT_VERSION, "sweep": self.about, "jobs": jobs}
        try:
            write_atomic(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            warn(f"{self.path} cannot be written ({error.strerror}); the jobs go on, and the next change is written")


def _read(path: Path) -> list[Entry]:
    """What is in the file. One that is damaged is kept aside: the run folders tell what is done."""
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path}: has format {version}, and this sasa_train reads {FORMAT_VERSION}")
        known = {f.name for f in dataclasses.fields(Entry)}
        entries = [Entry(name, **{k: v for k, v in job.items() if k in known}) for name, job in content["jobs"].items()]
        if not all(isinstance(part, list) for e in entries for part in (e.overrides, e.tries, e.trials)):
            raise ValueError("a job without overrides or tries")
        return entries
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        warn(f"{path} is damaged ({error}) and kept as {aside.name}; what is done is read from the run folders")
        return []


def note_metrics(entry: Entry, run_dir: Path) -> bool:
    """Bring `best` and `last` up to the run's metrics.jsonl; True where there is an evaluation more."""
    keys = ("top1", "top5", "loss", "step", "epoch")
    rows = []
    with contextlib.suppress(OSError):
        for line in (run_dir / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that is being written
                rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and row.get("split") == "val" and row.get("top1") is not None]
    rows = [{key: row.get(key) for key in keys} for row in rows]
    if not rows or rows[-1] == entry.last:
        return False
    entry.last, entry.best = rows[-1], max(rows, key=lambda row: row["top1"])
    return True


def is_finished(run_dir: Path) -> bool:
    """Whether the run says that it came to its end, and has its last checkpoint still."""
    try:
        info = json.loads((run_dir / "run.json").read_text())
        return info["status"] == "finished" and (run_dir / "checkpoints/last.pt").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False
