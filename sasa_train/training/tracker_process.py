"""The process of one tracker, which copies the rows of metrics.jsonl as the run tells it on stdin.

It reads metrics.jsonl up to the rows that the last checkpoint contains, so that it never sends a row that a resumed run
would write again. Each start offers all rows to the tracker, and sends those that the tracker does not have.

This module does not import torch.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sasa_train.config.keys import flatten
from sasa_train.refusal import shorten

LIMIT = 30.0  # seconds that this process has after the end of the run
# Mapping from a row's keys to tags. All other keys are tagged with their split, as in val/top1.
TAGS = {
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "images_per_sec": "perf/images_per_sec",
    "tflops": "perf/tflops",
    "mfu": "perf/mfu",
    "data_wait_fraction": "perf/data_wait_fraction",
    "memory_mib": "perf/memory_mib",
}
PROJECT = "sasa_train"  # name of the project or experiment, unless the tracker's own environment variable names another
MAX_PARAM, MAX_BATCH = 6000, 100  # MLflow's limits: characters per parameter, parameters per call
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "interrupted": "KILLED"}  # MLflow's; otherwise FAILED


class Wandb:
    """A run in Weights & Biases. Offline, each start has a folder of its own, which continues those before it."""

    def __init__(self, run_dir: Path, run_id: str, sweep: str, config: dict[str, Any]):
        import wandb

        last = _last_step_on_disk(run_dir / "wandb", run_id)
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            dir=run_dir,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            group=sweep or None,
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        # The server knows which steps it has; what an earlier start did not upload is sent again.
        self._last = last if self._run.offline else self._run.step - 1
        self.place = str(Path(self._run.dir).parent) if self._run.offline else str(self._run.url)

    def log(self, step: int, values: dict[str, float]) -> None:
        if step > self._last:
            self._run.log(values, step=step, commit=True)

    def end(self, status: str, best: dict[str, Any] | None) -> None:
        self._run.summary.update({"status": status, "best": best})
        self._run.finish(exit_code=0 if status == "finished" else 1)


def _last_step_on_disk(folder: Path, run_id: str) -> int:
    """Return the last step in the files that earlier starts left, or -1.

    A killed process's file lacks what W&B had not written yet, so that only the file tells what it contains.
    """
    last = -1
    for file in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
        found = subprocess.run(inspect, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
        step = json.loads(found)["step"]
        last = last if step is None else max(last, step)
    return last


class Mlflow:
    """A run in MLflow, found by the tag TAG."""

    TAG = "sasa_train.id"

    def __init__(self, run_dir: Path, run_id: str, sweep: str, config: dict[str, Any]):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{run_id}'")
        tags = {self.TAG: run_id} | ({"sweep": sweep} if sweep else {})
        run = runs[0] if runs else self._client.create_run(experiment, run_name=run_dir.name, tags=tags)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._log_params(config, run.data.params)
        # A step that was sent before is not sent again, because MLflow would keep both.
        history = self._client.get_metric_history
        self._steps = {key: {metric.step for metric in history(self._id, key)} for key in run.data.metrics}
        self.place = f"experiment {name}, run {self._id}"

    def _log_params(self, config: dict[str, Any], before: dict[str, str]) -> None:
        """Log the config; parameters that are there keep their first values, which MLflow does not change."""
        from mlflow.entities import Param

        new = {key: _as_param(value) for key, value in flatten(config).items() if key not in before}
        params = [Param(key, value) for key, value in new.items()]
        for first in range(0, len(params), MAX_BATCH):
            self._client.log_batch(self._id, params=params[first : first + MAX_BATCH])

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        new = [Metric(key, value, now, step) for key, value in values.items() if step not in self._steps.get(key, ())]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def end(self, status: str, best: dict[str, Any] | None) -> None:
        self._client.set_tag(self._id, "status", status)
        self._client.set_tag(self._id, "best", json.dumps(best))
        self._client.set_terminated(self._id, STATUS.get(status, "FAILED"))


def _as_param(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_PARAM else f"{text[: MAX_PARAM - 40]}... ({len(text):,} characters)"


def main(name: str, run_dir: Path, run_id: str, sweep: str) -> int:
    """Copy the rows of a run as its process says on stdin; return the exit code, and say on stdout what went wrong."""
    messages = queue.SimpleQueue[dict[str, Any]]()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as report:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the library prints
        try:
            config = yaml.safe_load((run_dir / "config.yaml").read_text())
            (own := run_dir / "wandb" if name == "wandb" else run_dir).mkdir(exist_ok=True)
            # Its own folder is locked until the process of an earlier start, which was killed, has sent the rest, and
            # the one around it while the tracker is opened, because MLflow may be making its database for several jobs.
            with _locked(own):
                with _locked(run_dir.parent):
                    kind: type[Wandb | Mlflow] = Wandb if name == "wandb" else Mlflow
                    tracker = kind(run_dir, run_id, sweep, config)
                print(f"place: {tracker.place}", file=report)
                _copy(run_dir / "metrics.jsonl", messages, tracker)
        except BaseException as error:  # also SystemExit
            print(f"error: {shorten(_reason(error))}", file=report)
            return 1
    return 0


def _reason(error: BaseException) -> str:
    """Describe an error on one line, without the user and password that an address in it may have."""
    return re.sub(r"://[^/@\s]*@", "://...@", " ".join(f"{type(error).__name__}: {error}".split()))


def _listen(messages: queue.SimpleQueue) -> None:
    """Pass on what the run's process says. After its end, this process has as much time as a run that waits for it."""
    for line in sys.stdin.buffer:
        messages.put(json.loads(line))
    messages.put({"num_bytes": 0, "end": {"status": "interrupted", "best": None}})  # unless its end was said
    time.sleep(LIMIT)
    os.killpg(0, signal.SIGKILL)


def _copy(metrics: Path, messages: queue.SimpleQueue, tracker: Wandb | Mlflow) -> None:
    """Send the rows of metrics.jsonl, all of one step together, until the end."""
    num_read, end = 0, None
    while end is None:
        message = messages.get()
        end = message["end"]
        with metrics.open("rb") as file:
            file.seek(num_read)
            data = file.read(max(0, message["num_bytes"] - num_read))
        if num_read + len(data) < message["num_bytes"]:  # rows that a full disk has not taken yet
            continue
        num_read += len(data)
        rows = map(json.loads, data.splitlines())
        for step, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
            tracker.log(step, {tag: value for row in of_step for tag, value in _values(row)})
    tracker.end(**end)


def _values(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the tags and values of a row, as in metrics.jsonl, but with NaN for null."""
    for key, value in row.items():
        if key not in ("split", "step"):
            yield TAGS.get(key, f"{row['split']}/{key}"), math.nan if value is None else float(value)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    name, run_dir, run_id, sweep = sys.argv[1:]
    # Python's own end would wait for the threads of a library that has failed.
    os._exit(main(name, Path(run_dir), run_id, sweep))
