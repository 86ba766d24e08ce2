"""Run the commands in this process or in a new one, and read the files they write."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sasa_train import train

# A run that takes a few seconds: a tiny attention network on a subset of the digits.
TINY = (
    "experiment=debug", "data.max_train_images=70", "data.max_val_images=30", "trainer.global_batch_size=16",
    "trainer.max_steps=null", "trainer.epochs=3", "trainer.log_every_steps=1", "output_dir=out",
)  # fmt: skip
TOGETHER = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def run_in_process(tmp_path, monkeypatch, *arguments: str) -> int:
    monkeypatch.chdir(tmp_path)
    return train.run_command(list(arguments))


def start(folder: Path, *arguments: str, command: str = "train") -> subprocess.Popen:
    words = [sys.executable, "-m", f"sasa_train.{command}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=folder, env=environment, preexec_fn=take_ctrl_c, **TOGETHER)


def take_ctrl_c() -> None:
    """Undo that tests in the background of a script ignore SIGINT, as their child processes then would, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(found: Callable[[], Any], what: str = "it", seconds: float = 240.0) -> Any:
    """Wait until `found()` returns a true value, and return that value."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
    return result


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and len((run_dir / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} rows; exit code {process.poll()}\n{process.communicate()[0]}")


def kill_after(count: int, run_dir: Path, *arguments: str) -> None:
    """Start the run in `run_dir`, which is in the folder out/, and kill it once its log has `count` rows."""
    process = start(run_dir.parents[1], *arguments)
    wait_for_rows(run_dir, count, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL


WORKER = Path(__file__).with_name("torchrun_worker.py")


def launch(folder: Path, num_processes: int, *arguments: str, options=("--standalone",), **env: str) -> tuple[int, str]:
    """Run torchrun_worker.py, under torchrun unless it is the only process; return the exit code and all output."""
    torchrun = ["-m", "torch.distributed.run", *options, f"--nproc-per-node={num_processes}"]
    is_alone = num_processes == 1 and "--nnodes=2" not in options
    words = [sys.executable, *([] if is_alone else torchrun), WORKER, *arguments]
    # The last variable is normally set by sasa-train, which is too late here because torch has already been imported.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | env
    process = subprocess.run(words, cwd=folder, env=environment, timeout=280, **TOGETHER)
    return process.returncode, process.stdout
