"""Run the commands, in this process or in one of their own, and read what they leave behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sasa_train import train

# A run of seconds: a tiny attention net on a part of the digits.
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
    return subprocess.Popen(words, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **TOGETHER)


def wait_for(found: Callable[[], Any], what: str = "it", seconds: float = 240.0) -> Any:
    """Return what `found()` gives once that is true."""
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


WORKER = Path(__file__).with_name("torchrun_worker.py")


def launch(folder: Path, num_processes: int, *arguments: str, options=("--standalone",), **env: str) -> tuple[int, str]:
    """The worker by torchrun, or alone where it is one process: exit code, and all that was said."""
    torchrun = ["-m", "torch.distributed.run", *options, f"--nproc-per-node={num_processes}"]
    is_alone = num_processes == 1 and "--nnodes=2" not in options
    words = [sys.executable, *([] if is_alone else torchrun), WORKER, *arguments]
    # The last one is sasa-train's own, too late here, where torch is imported before.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | env
    process = subprocess.run(words, cwd=folder, env=environment, timeout=280, **TOGETHER)
    return process.returncode, process.stdout
