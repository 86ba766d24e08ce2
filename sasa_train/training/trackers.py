"""Copies of metrics.jsonl in Weights & Biases and MLflow, which may fail without any effect on the run.

Each tracker has a process of its own (see `tracker_process`). Its library may raise, hang, print or exit there: the run
only writes short lines into a pipe, without waiting, and at its end waits for LIMIT seconds at most.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sasa_train.extras import why_not
from sasa_train.processes.packages import same_packages
from sasa_train.refusal import ConfigError
from sasa_train.runs.folder import RunFolder
from sasa_train.runs.info import read_info
from sasa_train.terminal import printable, say, warn
from sasa_train.training import tracker_process
from sasa_train.training.tracker_process import LIMIT


def check_trackers(names: list[str]) -> None:
    """Raise ConfigError if the package of a tracker is missing."""
    for name in names:
        if name != "tensorboard" and (reason := why_not(f"logger={name}", name)):
            raise ConfigError(reason)


def tracker_id(run: RunFolder, names: list[str]) -> dict[str, str]:
    """Return the id that a run has in all trackers, for its provenance: its own from before, or a new one if needed.

    A new run that starts from another one's checkpoint gets an id of its own.
    """
    before = {} if run.checkpoint is None or run.is_new else run.checkpoint["provenance"]
    found = before.get("tracker_id") or read_info(run.path).get("tracker_id")
    if found is None and set(names) - {"tensorboard"}:
        found = secrets.token_hex(8)
    return {} if found is None else {"tracker_id": found}


def start_trackers(names: list[str], run: RunFolder) -> list["Tracker"]:
    return [Tracker(name, run.path, run.provenance["tracker_id"]) for name in names if name != "tensorboard"]


def end_trackers(trackers: list["Tracker"], status: str, best: dict[str, Any] | None) -> None:
    """Tell the trackers how the run ended, and wait for all of them together for LIMIT seconds at most."""
    deadline = time.monotonic() + LIMIT
    for tracker in trackers:
        tracker.tell(end={"status": status, "best": best})
    for tracker in trackers:
        tracker.wait(deadline)


class Tracker:
    """The process that copies a run's rows to one tracker. Nothing here raises or waits, except `wait`."""

    def __init__(self, name: str, run_dir: Path, run_id: str):
        """Start the process; a run in the folder of a sweep is a job of it."""
        self.name, self._heard, self._num_bytes, self._was_asked = name, b"", 0, False
        self._process: subprocess.Popen[bytes] | None = None
        try:
            sweep = run_dir.parent.name if any(run_dir.parent.glob("ledger*.json")) else ""
            process = subprocess.Popen(
                [sys.executable, "-m", tracker_process.__name__, name, str(run_dir), run_id, sweep],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | same_packages(),
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
        except OSError as error:
            self._give_up(str(error))
            return
        assert process.stdin is not None and process.stdout is not None  # for type checkers
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    def tell(self, num_bytes: int | None = None, end: dict[str, Any] | None = None) -> None:
        """Let the process copy the first `num_bytes` of metrics.jsonl (None: no more) until the `end` of the run."""
        self._hear()
        self._num_bytes, self._was_asked = self._num_bytes if num_bytes is None else num_bytes, end is not None
        if self._process is not None:
            # If the pipe is full, because the tracker hangs, nothing is written; the next number includes this one.
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(json.dumps({"num_bytes": self._num_bytes, "end": end}).encode() + b"\n")

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended, and kill it at `deadline` (of time.monotonic)."""
        if self._process is None:
            return
        self._stdin.close()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._hear()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._give_up(f"it has not taken them within {LIMIT:.0f} s")
        self._hear()

    def _hear(self) -> None:
        """Say where the tracker has the run, and warn once if its process has failed."""
        if self._process is None:
            return
        code = self._process.poll()
        self._heard += self._stdout.read(2**16) or b""
        *lines, self._heard = self._heard.split(b"\n")
        reason = f"its process ended with code {code}"
        for kind, _, text in (printable(line.decode(errors="replace")).partition(": ") for line in lines):
            if kind == "place":
                say(f"{self.name:<12}{text}")
            reason = text if kind == "error" else reason
        if code or (code is not None and not self._was_asked):
            self._give_up(reason)
        elif code is not None:
            self._close()

    def _give_up(self, reason: str) -> None:
        self._close()
        warn(f"{self.name} gets no more rows of this run ({reason}); metrics.jsonl has them all")

    def _close(self) -> None:
        if self._process is not None:
            self._stdin.close()
            self._stdout.close()
        self._process = None
