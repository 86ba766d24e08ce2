"""The scheduler: each job runs in its own process on its own devices, and starts as soon as a slot is free."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sasa_train.config.overrides import as_written
from sasa_train.files import holder, inside, open_own, open_regular
from sasa_train.machine import usable_processors
from sasa_train.processes.packages import same_packages
from sasa_train.refusal import ConfigError
from sasa_train.runs.info import has_finished
from sasa_train.runs.ledger import FINISHED, Job, Ledger
from sasa_train.signals import StopRequest, name_of
from sasa_train.sweep.planning import SweepConfig
from sasa_train.terminal import DONE, FAILED, INTERRUPTED, REFUSED, printable_lines

POLL = 0.2  # seconds between polls of the jobs
LOOK = 1.0  # seconds between reads of a job's metrics
PATIENCE = 300.0  # seconds that a job has to save and exit before it is killed
NUM_LOG_LINES = 30  # number of lines shown from a failed job's log
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


class JobList:
    """The queue of jobs: interrupted jobs come first, failed ones last, and finished ones are not run again."""

    def __init__(self, jobs: Iterable[Job], folder: Path):
        self.folder = folder
        order = {"interrupted": 0, "waiting": 1, "refused": 2}
        self.queue = sorted((job for job in jobs if job.state in order), key=lambda job: order[job.state])
        self.num_running = 0

    def next(self) -> Job | None:
        """Return the next job to start (the first one with an unlocked run folder), or None.

        A folder may be locked by a job of an earlier command that is still saving its checkpoint.
        """
        for job in self.queue:
            holding = holder(self.folder / job.name)
            job.reason = f"its folder is in use by {holding}" if holding else job.reason
            if not holding:
                self.queue.remove(job)
                self.num_running += 1
                return job
        return None

    def has_more(self) -> bool:
        """Return True if a job may become available when a running job ends."""
        return self.num_running > 0 or self.num_waiting() > 0

    def num_waiting(self) -> int:
        """Return the number of jobs that have not been started yet."""
        return len(self.queue)

    def look(self, job: Job) -> bool:
        """Record a running job's latest evaluation and return True if the job should be pruned."""
        return False

    def ended(self, job: Job) -> None:
        """Record how a job ended."""
        self.num_running -= 1
        if job.state == "waiting":
            self.queue.append(job)


@dataclass
class Running:
    """The process of a running job."""

    job: Job
    process: subprocess.Popen
    place: int
    log: Path
    log_start: int  # bytes already in the log from earlier attempts
    first_epoch: int = 0  # epochs that were done before this start
    started: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    is_pruned: bool = False
    asked: float | None = None  # time at which the process was told to stop

    def ask_to_stop(self) -> None:
        if self.asked is None:
            self.asked = time.monotonic()
            self.process.send_signal(signal.SIGTERM)

    def kill_if_late(self) -> None:
        if self.asked is not None and time.monotonic() - self.asked > PATIENCE:
            os.killpg(self.process.pid, signal.SIGKILL)


class Processes:
    """The running jobs of a sweep. `run` starts, watches and ends them, and records every change in the ledger."""

    def __init__(self, config: SweepConfig, folder: Path, ledger: Ledger, source: JobList, stop: StopRequest):
        self.config, self.folder, self.ledger, self.source, self.stop = config, folder, ledger, source, stop
        self.places = list(device_groups(config))
        self.running: list[Running] = []
        # The duration of each completed job, also by earlier commands.
        self.seconds = [seconds for job in ledger.asked_for() if (seconds := duration_of(job))]

    def seconds_left(self) -> float | None:
        """Estimate the remaining seconds, based on finished jobs or running jobs' epochs; None if there are neither."""
        now, estimates = time.monotonic(), list(self.seconds)
        for running in self.running if not estimates else []:
            job = running.job
            if job.last and job.epochs and job.last["epoch"] > running.first_epoch:
                num_epochs = job.last["epoch"] - running.first_epoch
                estimates.append((now - running.started) * job.epochs / num_epochs)
        if not estimates:
            return None
        each = sum(estimates) / len(estimates)
        of_running = [
            max(0.0, each * (1 - running.first_epoch / (running.job.epochs or 1)) - (now - running.started))
            for running in self.running
        ]
        return (sum(of_running) + each * self.source.num_waiting()) / len(self.places)

    def run(self, show: Callable[["Processes", str], None]) -> None:
        """Run until no job is left or a stop is requested; `show` receives each event, and "" between events."""
        was_said = False
        while True:
            for event in [*self._reap(), *self._look(), *self._start()]:
                show(self, event)
            show(self, "")
            if not self.running:
                if self.stop.requested() or not self.source.has_more():
                    return
                if not was_said:
                    show(self, "waits for runs that another process holds still")
                was_said = True
            time.sleep(POLL)

    def _start(self) -> Iterator[str]:
        """Start jobs in the free slots, unless a stop has been requested."""
        while not self.stop.requested() and (free := self._free_place()) is not None:
            job = self.source.next()
            if job is None:
                return
            yield self._begin(job, free)

    def _free_place(self) -> int | None:
        taken = {running.place for running in self.running}
        return next((n for n in range(len(self.places)) if n not in taken), None)

    def _begin(self, job: Job, place: int) -> str:
        job.begin()
        self.ledger.save()  # saved first: a kill before the start leaves an extra job in the ledger, not a missing one
        log = self.folder / "logs" / "-".join([job.name, *filter(None, [self.config.worker])])
        log = log.with_name(f"{log.name}.log")
        inside(self.folder, "logs").mkdir(exist_ok=True)
        with os.fdopen(open_own(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                self._command(job),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(place),
                start_new_session=True,  # so that Ctrl-C reaches only the sweep, which forwards it
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self.running.append(Running(job, process, place, log, log_start, job.last["epoch"] if job.last else 0))
        return f"started     {job.label}"

    def _command(self, job: Job) -> list[str]:
        program = [sys.executable]
        if self.config.devices_per_job > 1:
            launcher = ["--standalone", f"--nproc-per-node={self.config.devices_per_job}"]
            program += ["-m", "torch.distributed.run", *launcher]
        return [*program, "-m", "sasa_train.train", *job_arguments(job, self.folder)]

    def _environment(self, place: int) -> dict[str, str]:
        threads = max(1, usable_processors() // (len(self.places) * self.config.devices_per_job))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | same_packages()
        devices = self.places[place]
        return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})

    def _look(self) -> Iterator[str]:
        for running in self.running:
            if self.stop.requested():
                running.ask_to_stop()
            running.kill_if_late()
            if time.monotonic() - running.looked < LOOK:
                continue
            running.looked = time.monotonic()
            has_more = running.job.note_metrics(self.folder / running.job.name)
            if has_more and self.source.look(running.job):
                running.is_pruned = True
                running.ask_to_stop()
                yield f"gives up    {running.job.label}"

    def _reap(self) -> Iterator[str]:
        for running in list(self.running):
            if (code := running.process.poll()) is None:
                continue
            self.running.remove(running)
            job, seconds = running.job, time.monotonic() - running.started
            said = tail(running.log, running.log_start)
            if self.config.devices_per_job > 1:
                code, said = behind_torchrun(code, said)
            if running.asked is not None and code < 0:
                code = INTERRUPTED  # the job was stopped before it could save, or saving took too long
            last = said[-1] if said else ""
            if running.asked is not None and self.stop.requested():
                last = last.replace(signal.SIGTERM.name, self.stop.reason, 1)  # by which the sweep passed it on
            finish(job, self.folder, code, seconds, self.config.max_tries, last)
            if running.is_pruned and job.state == "interrupted":
                job.end("pruned", "given up: others were better by then")
                job.tries[-1]["reason"] = job.reason
            if job.state in ("done", "pruned"):
                self.seconds.append(duration_of(job) or seconds)
            self.ledger.save()  # saved before the study is told, because a study never repeats a finished trial
            self.source.ended(job)
            yield describe_end(job, seconds)
            if job.state in ("failed", "refused") or code not in (DONE, INTERRUPTED):
                yield f"{running.log}:\n" + "\n".join(f"  | {line}" for line in said[-NUM_LOG_LINES:])


def duration_of(job: Job) -> float | None:
    """Return the seconds of all tries of a finished job; None if it is not finished or a duration is unknown."""
    seconds = [one["seconds"] for one in job.tries]
    known = [one for one in seconds if one is not None]
    return sum(known) if job.state in ("done", "pruned") and known and len(known) == len(seconds) else None


def job_arguments(job: Job, folder: Path) -> list[str]:
    """Return the sasa-train arguments for a job."""
    return [*job.overrides, f"output_dir={as_written(str(folder))}"]


def finish(job: Job, folder: Path, code: int, seconds: float | None, max_tries: int, said: str) -> None:
    """Set the job's state from its exit code and run folder; `said` is the last line of the job's output.

    The run folder takes precedence, because a signal may have arrived after the run had finished.
    """
    job.note_metrics(folder / job.name)
    if has_finished(folder / job.name, job.overrides):
        job.end("done", FINISHED, code, seconds)
    elif code == INTERRUPTED:
        job.end("interrupted", said.partition("; to continue")[0] or "stopped", INTERRUPTED, seconds)
    elif code == REFUSED and "is in use by" in said:  # another process acquired the lock first
        job.end("waiting", said, code, seconds)
    elif code == REFUSED:
        job.end("refused", said, code, seconds)
    else:
        reason = f"killed by {name_of(-code)}" if code < 0 else f"exit code {code}: {said}"
        job.end("waiting", reason, code, seconds)
        if job.failures_in_a_row() >= max_tries:
            job.state = "failed"


def describe_end(job: Job, seconds: float) -> str:
    word = "tries again" if job.state == "waiting" else job.state
    result = f"top1 {job.last['top1']:.2f}" if job.last and job.state in ("done", "pruned") else job.reason
    return f"{word:<11} {job.label}  {printable_lines(result)}  ({seconds:.0f} s)"


def tail(path: Path, start: int) -> list[str]:
    """Return the last lines of a log from byte `start` on, escaped for printing."""
    try:
        with open_regular(path) as file:
            file.seek(max(start, path.stat().st_size - 2**16))
            lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return []
    return [printable_lines(line) for line in lines if line.strip()]


def behind_torchrun(code: int, said: list[str]) -> tuple[int, list[str]]:
    """Return the processes' own exit code, which torchrun replaces with 1, and the output without torchrun's lines."""
    if code != DONE and (saved := [line for line in said if ": saved at step" in line]):
        return INTERRUPTED, saved
    codes = [int(found[1]) for line in said if (found := re.search(r"exitcode\s*: (-?\d+)", line))]
    return codes[-1] if code == FAILED and codes else code, [
        line for line in said if line.startswith("train: ")
    ] or said


def device_groups(config: SweepConfig) -> Iterator[list[str]]:
    """Yield the GPUs for each concurrent job; jobs share GPUs if there are too few.

    Raises:
        ConfigError: `devices_per_job` exceeds the number of GPUs.
    """
    gpus, each = visible_gpus(), config.devices_per_job
    if each > max(1, len(gpus)):
        raise ConfigError(f"sweep.devices_per_job={each}, but this machine has {len(gpus)} GPUs")
    groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)] or [[]]
    for number in range(config.max_parallel or len(groups)):
        yield groups[number % len(groups)]


def visible_gpus() -> list[str]:
    """Return device names for CUDA_VISIBLE_DEVICES, without creating a CUDA context in this process."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return [str(n) for n, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def _end_with_parent() -> None:
    """Make this child process receive SIGTERM if the sweep is killed, so that its job saves and stops."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
