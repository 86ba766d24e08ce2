"""Check that Weights & Biases and MLflow get a copy of metrics.jsonl, and can do nothing else to a run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from reading_runs import assert_same_run, last
from running_commands import TINY, start, wait_for

from sasa_train import extras
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.runs.folder import RunFolder
from sasa_train.runs.info import update_info
from sasa_train.runs.schema import TRACKER_ID, first_wrong
from sasa_train.training import trackers
from sasa_train.training.tracker_process import TAGS
from sasa_train.training.trackers import tracker_id

needs_both = pytest.mark.skipif(
    not (find_spec("wandb") and find_spec("mlflow")), reason="wandb or mlflow-skinny is not installed"
)
RUN = (*TINY, "run_name=run", "trainer.ema_decay=0.5")  # as tiny_run

# Two steps after the checkpoint of step 8, the hook waits until MLflow has the first epoch. Then it kills MLflow's
# process and the run, but not the process of W&B, which learns of it as after any other kill.
KILLER = """
import os, pathlib, signal, sqlite3, time

def has_first_epoch():
    try:
        with sqlite3.connect("file:mlflow.db?mode=ro", uri=True) as database:
            return database.execute("SELECT 1 FROM metrics WHERE key = 'val/top1'").fetchone() is not None
    except sqlite3.Error:  # it is still being made
        return False

def kill(event, view):
    if event != "step" or view.step != 10 or pathlib.Path("was_killed").exists():
        return
    end = time.monotonic() + 100
    while not has_first_epoch() and time.monotonic() < end:
        time.sleep(0.2)
    pathlib.Path("was_killed").touch()
    for child in pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"mlflow" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\\0"):
            os.killpg(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Both packages at once. FAKE_WANDB=log:hang lets W&B hang in `log`, and so on.
FAKE = """
import errno, os, sys, time

def act(call):
    what, _, how = os.environ[f"FAKE_{__name__.upper()}"].partition(":")
    if what != call:
        return
    print("a library may print", flush=True)
    if how == "hang":
        time.sleep(1000)
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "exit":
        os._exit(0)
    raise ValueError(f"{call} failed for https://me:secret@example.org")

class Anything:
    offline, step, url, run_id, experiment_id = None, 0, "", "", ""
    def __init__(self, *args, **kwargs):
        self.data, self.info = self, self
        self.params, self.metrics, self.summary = {}, {}, self
    def __getattr__(self, name):
        def call(*args, **kwargs):
            act(name)
            return [] if name in ("search_runs", "get_metric_history") else Anything()
        return call

act("import")
init, Settings, MlflowClient = Anything().init, Anything, Anything
sys.modules["mlflow.entities"] = sys.modules[__name__]
Param = Metric = Anything
"""


def expected(run_dir: Path) -> dict[tuple[str, int], float]:
    """Return the values of metrics.jsonl by tag and step."""
    found = {}
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for key in row.keys() - {"split", "step"}:
            value = math.nan if row[key] is None else row[key]
            found[TAGS.get(key, f"{row['split']}/{key}"), row["step"]] = pytest.approx(value, rel=0, nan_ok=True)
    return found


def in_wandb(run_dir: Path) -> tuple[dict[tuple[str, int], float], list[dict]]:
    """Return all values in the files that the starts of a run left, none of them twice, and all other records."""
    found, others = {}, []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):  # in the order of their start
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            record = json.loads(line)
            if record["type"] != "history":
                others.append(record)
                continue
            item = record["history"]["item"]
            new = {(key, item["_step"]): value for key, value in item.items() if not key.startswith("_")}
            assert not new.keys() & found.keys()
            found |= new
    return found, others


def in_mlflow() -> tuple[dict[tuple[str, int], float], object]:
    """Return all values in the database, none of them twice, and the only run that has them."""
    from mlflow import MlflowClient

    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    metrics = [m for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)]
    found = {(metric.key, metric.step): metric.value for metric in metrics}
    assert len(found) == len(metrics)
    return found, run


@needs_both
@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_clean_series_equal_to_metrics_jsonl(tmp_path, monkeypatch, in_process):
    """Check that no row is doubled, missing or from a step that was repeated, whatever was killed with the run."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": "digits",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ledger.json").touch()  # the run is a job of a sweep
    # At the end of an epoch, there is a checkpoint before the val row, of a step whose train row it has.
    every = "trainer.checkpoint_every_steps=4"
    arguments = (*RUN, every, "logger=[wandb,mlflow]", "hooks=[killer.kill]", "imports=[killer]")
    process = start(tmp_path, *arguments)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == -signal.SIGKILL, output
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers, "LIMIT", 120.0)  # on a busy machine
    run = tmp_path / "out/run"
    identity = last(run)["provenance"]["tracker_id"]
    told = in_process("train", *arguments)
    assert "gets no more rows" not in told.stderr
    assert last(run)["provenance"]["tracker_id"] == identity and not (run / "tensorboard").exists()
    values, others = in_wandb(run)
    assert values == expected(run)
    [first, second] = [record["run"] for record in others if record["type"] == "run"]
    assert first["run_id"] == second["run_id"] == identity and first["run_group"] == "out"
    assert first["config"]["update"]["trainer"]["epochs"] == 3
    values, of_mlflow = in_mlflow()
    assert values == expected(run)
    assert of_mlflow.info.status == "FINISHED" and of_mlflow.data.tags["sweep"] == "out"
    assert of_mlflow.data.params["trainer.epochs"] == "3" and of_mlflow.data.params["data.args"] == "{}"


@pytest.mark.parametrize(
    "of_wandb,of_mlflow",
    [("init:raise", "log_batch:full"), ("log:hang", "import:hang"), ("finish:raise", "create_run:exit")],
)
def test_a_tracker_that_fails_never_changes_the_run(of_wandb, of_mlflow, tiny_run, tmp_path, monkeypatch, in_process):
    """Check that a tracker that raises, hangs, exits or has no disk left costs a run a warning and nothing else."""
    for name, how in {"wandb": of_wandb, "mlflow": of_mlflow}.items():
        monkeypatch.setenv(f"FAKE_{name.upper()}", how)
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setattr(trackers, "LIMIT", 2.0 if "hang" in of_wandb else 60.0)
    told = in_process("train", *RUN, "logger=[tensorboard,wandb,mlflow]")
    assert_same_run(tiny_run, tmp_path / "out/run")
    for name, how in {"wandb": of_wandb, "mlflow": of_mlflow}.items():
        assert told.stderr.count(f"WARNING: {name} gets no more rows of this run") == 1, told.stderr
        call, _, how = how.partition(":")
        reasons = {"raise": f"ValueError: {call} failed for https://...@example.org", "full": "No space left on device"}
        reasons |= {"hang": "it has not taken them within", "exit": "its process ended with code 0"}
        assert reasons[how] in told.stderr
    assert "a library may print" not in told.stdout + told.stderr


CALLS = {
    "wandb": ("import", "init", "log", "update", "finish"),
    "mlflow": (
        "import", "get_experiment_by_name", "search_runs", "create_run", "update_run", "log_batch", "set_tag",
        "set_terminated",
    ),
}  # fmt: skip


def start_tracker(name: str, run_dir: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sasa_train.training.tracker_process", name, str(run_dir), "0" * 16, ""]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **pipes)


def message(num_bytes: int, end: dict | None = None) -> bytes:
    return json.dumps({"num_bytes": num_bytes, "end": end}).encode() + b"\n"


END = {"status": "finished", "best": None}


@pytest.mark.parametrize("name,call", [(name, call) for name, calls in CALLS.items() for call in calls])
def test_an_error_in_any_call_of_a_tracker_ends_its_process_with_one_line(name, call, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for each in CALLS:
        (tmp_path / "fake" / each).mkdir(parents=True)
        (tmp_path / "fake" / each / "__init__.py").write_text(FAKE)
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")])
    process = start_tracker(name, run, PYTHONPATH=path, **{f"FAKE_{name.upper()}": f"{call}:raise"})
    said = process.communicate(message((run / "metrics.jsonl").stat().st_size, END), timeout=100)[0].decode()
    assert process.returncode == 1 and said.count("\n") == said.count("place: ") + 1
    assert said.splitlines()[-1] == f"error: ValueError: {call} failed for https://...@example.org"


@needs_both
@pytest.mark.slow
def test_mlflows_store_of_files_has_each_row_once_after_a_kill(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    half = len(b"".join(lines[: len(lines) // 2]))
    store = {"MLFLOW_TRACKING_URI": str(tmp_path / "store"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in (store | {"MLFLOW_EXPERIMENT_NAME": "digits"}).items():
        monkeypatch.setenv(name, value)
    killed = start_tracker("mlflow", run)
    killed.stdin.write(message(half))
    killed.stdin.flush()
    step = json.loads(lines[len(lines) // 2 - 1])["step"]
    wait_for(lambda: any(f" {step}\n" in path.read_text() for path in tmp_path.glob("store/*/*/metrics/**/loss")))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start_tracker("mlflow", run)
    again.communicate(message((run / "metrics.jsonl").stat().st_size, END), timeout=100)
    assert again.returncode == 0
    values, of_mlflow = in_mlflow()
    assert values == expected(run) and of_mlflow.info.status == "FINISHED"


def test_a_run_keeps_its_id_and_a_new_run_from_its_checkpoint_has_another(tmp_path):
    checkpoint = {"provenance": {"tracker_id": "a" * 16}}
    of_run = RunFolder(tmp_path, None, Checkpoints(tmp_path, 0), checkpoint, is_new=False)
    assert tracker_id(of_run, ["tensorboard"]) == tracker_id(of_run, ["mlflow"]) == checkpoint["provenance"]
    of_new = RunFolder(tmp_path, None, Checkpoints(tmp_path, 0), checkpoint)
    assert tracker_id(of_new, ["tensorboard"]) == {}
    made = tracker_id(of_new, ["wandb"])
    assert made != checkpoint["provenance"] and not first_wrong(made, {"tracker_id": TRACKER_ID})
    update_info(tmp_path, made)  # killed before the first checkpoint
    assert tracker_id(of_new, ["wandb"]) == made


def test_what_a_run_cannot_log_to_is_refused_before_anything_is_written(tmp_path, monkeypatch, in_process):
    """Check a missing package, also beside a folder of its name such as W&B makes one, and a misspelt tracker."""
    monkeypatch.setitem(extras.EXTRAS, "wandb", ("wandb_elsewhere>=1",))
    (tmp_path / "wandb_elsewhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    told = in_process("train", *TINY, "logger=[tensorboard,wandb]", expect=2).stderr
    assert "logger=wandb needs wandb_elsewhere>=1, not installed here: pip install 'sasa_train[wandb]'" in told
    told = in_process("train", *TINY, "logger=[wanbd]", expect=2).stderr
    assert "logger=wanbd must name some of tensorboard, wandb, mlflow; did you mean wandb?" in told
    assert "must name each once" in in_process("train", *TINY, "logger=[mlflow,mlflow]", expect=2).stderr
    assert not (tmp_path / "out").exists()
