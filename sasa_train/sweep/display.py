"""The progress display of a sweep: a live table on a terminal, one line per event, and a final table."""

import contextlib
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable

from sasa_train.config.differences import without_groups
from sasa_train.runs.ledger import Job, Ledger
from sasa_train.runs.metrics import describe_value
from sasa_train.sweep.scheduler import Processes
from sasa_train.terminal import duration, printable

REFRESH = 0.5  # seconds


class Display:
    """Displays a sweep's progress; it is called with each event of the processes, and with "" between events."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.num_lines, self.drawn = 0, 0.0

    def __call__(self, processes: Processes, event: str) -> None:
        if event:
            self.clear()
            _write(_in_lines(event) if self.is_terminal else event)
        if self.is_terminal and (event or time.monotonic() - self.drawn > REFRESH):
            lines = table_of(processes)
            self.clear()
            _write("\n".join(lines))
            self.num_lines, self.drawn = len(lines), time.monotonic()

    def clear(self) -> None:
        """Erase the live table."""
        if self.num_lines:
            _write(f"\x1b[{self.num_lines}F\x1b[J", end="")
        self.num_lines = 0


def _write(text: str, end: str = "\n") -> None:
    with contextlib.suppress(OSError):  # a closed pipe must not end the sweep
        print(text, end=end, flush=True)


def table_of(processes: Processes) -> list[str]:
    """Return a headline and one line per running job, no wider than the terminal."""
    size = shutil.get_terminal_size((120, 24))
    left = processes.seconds_left()
    parts = [counts(processes.ledger), f"ETA {duration(left)}" if left is not None else "ETA -"]
    lines = ["", "  ".join(parts)]
    if (top := best(processes.ledger)) and top.last:
        lines.append(f"  best {describe_value(top.last, top.metric)} of those done  {top.label}")
    for running in processes.running[: size.lines - 5]:
        job = running.job
        epoch, top1 = (job.last["epoch"], f"{job.last['top1']:6.2f}") if job.last else (0, f"{'-':>6}")
        clock = duration(time.monotonic() - running.started)
        where = f"  GPU {','.join(gpus)}" if (gpus := processes.places[running.place]) else ""
        number = f"  try {len(job.tries)}" if len(job.tries) > 1 else ""
        lines.append(f"  epoch {epoch:>3}/{job.epochs or '?':<3}  top1 {top1}  {clock:>12}{where}{number}  {job.label}")
    return [_cut(printable(line), size.columns - 1) for line in lines]


def _cut(line: str, width: int) -> str:
    """Shorten a line that is too wide in the groups of its keys, then at its end."""
    if len(line) > width:
        line = without_groups(line)
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _in_lines(event: str) -> str:
    """Break lines that are too wide between words; they go on below the text after a job's state."""
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size((120, 24)).columns,
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapper.fill(line) for line in event.split("\n"))


def counts(ledger: Ledger) -> str:
    """Count jobs by state, as in "12 jobs: 5 done, 2 running, 5 waiting"."""
    found = Counter(job.state for job in ledger.asked_for())
    states = ", ".join(f"{number} {state}" for state, number in found.most_common())
    return f"{found.total()} jobs: {states}" if states else "no jobs yet"


def best(ledger: Ledger) -> Job | None:
    """Return the finished job that is best by its last epoch: a running job may fall again."""
    return max((job for job in ledger.asked_for() if job.last and job.state == "done"), key=_score, default=None)


def _score(job: Job) -> float:
    return job.score


def final_table(jobs: Iterable[Job]) -> str:
    """Return a table of all jobs with their results, the best first."""
    rows = []
    jobs = sorted(jobs, key=_score, reverse=True)
    metric = jobs[0].metric if len({job.metric for job in jobs}) == 1 else "top1"
    for job in jobs:
        last, top = (
            f"{row[metric]:.2f}" if row and row.get(metric) is not None else "-" for row in (job.last, job.best)
        )
        reason = "" if job.state == "done" else f"  {job.reason}"
        rows.append((last, top, job.state, str(len(job.tries)), job.label + reason))
    head = (metric, "best", "state", "tries", "job")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(4)]
    lines = [[*(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False)), row[4]] for row in (head, *rows)]
    return "\n".join(printable("  ".join(line)) for line in lines)
