"""Check that a killed, stopped or broken data worker ends the run in seconds, with a message that says what to do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from making_data import CPU, SMALL_RUN, Reader, config_for, keys, make_image_folder
from running_commands import start, wait_for
from torch.utils.data import DataLoader

from sasa_train.data import reading
from sasa_train.data.loader import build_loaders
from sasa_train.data.workers import DataWorkerError, Workers
from sasa_train.refusal import ConfigError

TIMEOUT = 2.0  # seconds
SLACK = 7.0  # PyTorch checks every 5 seconds whether its workers are alive


def suicide(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def read_until_error(workers: Workers) -> str:
    start = time.monotonic()
    with pytest.raises(DataWorkerError) as caught:
        list(workers.read(keys()))
    assert time.monotonic() - start < TIMEOUT + SLACK
    return str(caught.value)


def assert_closes_at_once(workers: Workers) -> None:
    processes, start = workers._processes(), time.monotonic()
    workers.close()
    assert time.monotonic() - start < 7
    for process in processes:
        deadline = time.monotonic() + 1
        # The loader's thread waits for it too; between its waitpid and recording the result, is_alive() is wrong here.
        while process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not process.is_alive()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_everything_is_read_once_in_order_and_again(num_workers):
    workers = Workers(Reader(lambda: None), "train", num_workers, TIMEOUT)
    for abandoned in (False, True, False):
        results = workers.read(keys())
        if abandoned:
            next(results)
            continue
        found = list(results)
        assert all(torch.equal(content, torch.from_numpy(micro.indices + 100)) for micro, content in found)
        assert [micro.indices[0] for micro, _ in found] == list(range(0, 35, 5))
    workers.close()


@pytest.mark.parametrize(
    "number,told",
    [
        (signal.SIGKILL, "was killed by SIGKILL, perhaps for want of memory"),
        (signal.SIGBUS, "was killed by SIGBUS, perhaps for want of shared memory"),
        (40, "was killed by signal 40"),
        (signal.SIGSTOP, "is stopped"),
    ],
)
def test_a_killed_or_stopped_worker_ends_the_run_with_its_name(number, told):
    """Check that the run ends (after a timeout if a worker hangs, e.g. on a failed disk) and names the worker."""
    workers = Workers(Reader(suicide(number)), "train", 2, TIMEOUT)
    message = read_until_error(workers)
    pids = [process.pid for process in workers._processes()]
    assert message.startswith("train: ") and f"data worker {pids[1]} {told}" in message
    assert ("data.worker_timeout=2 seconds" in message) == (number == signal.SIGSTOP)
    assert "while f5\\n.png, g6\\n.png, h7\\n.png, i8\\n.png, j9\\n.png were waited for" in message
    for remedy in ("data.num_workers=1", "trainer.micro_batch_size", "data.worker_timeout=4", "same command again"):
        assert remedy in message
    assert_closes_at_once(workers)


def stop(pid: int) -> None:
    """Stop a process and wait until each of its threads has stopped: on a busy machine, one may answer for a moment."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + SLACK
    threads = list(Path(f"/proc/{pid}/task").glob("*/stat"))
    while any(thread.read_text().rpartition(")")[2].split()[0] != "T" for thread in threads):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_worker_stopped_after_its_work_is_noticed_too():
    """Check that the run notices a worker that was stopped after finishing a batch, which it can no longer deliver."""
    workers = Workers(Reader(lambda: None), "val", 1, TIMEOUT)
    results = workers.read(keys())
    next(results)
    time.sleep(0.5)
    stop(workers._processes()[0].pid)
    start = time.monotonic()
    with pytest.raises(DataWorkerError, match=r"val: .* is stopped\) while f5"):
        list(results)
    assert time.monotonic() - start < TIMEOUT + SLACK
    assert_closes_at_once(workers)


def test_a_worker_that_died_while_nobody_waited_is_found_at_the_next_start():
    """Check that a dead worker is found even if another DataLoader has installed PyTorch's SIGCHLD handler."""
    list(DataLoader([0], num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
    workers = Workers(Reader(lambda: None), "val", 2, TIMEOUT)
    list(workers.read(keys()))
    os.kill(workers._processes()[1].pid, signal.SIGKILL)
    time.sleep(0.5)  # when PyTorch would have raised, in unrelated code
    assert f"data worker {workers._processes()[1].pid} was killed by SIGKILL" in read_until_error(workers)
    assert_closes_at_once(workers)


def test_stopped_workers_do_not_hold_up_the_end_of_a_run():
    workers = Workers(Reader(lambda: None), "val", 3, TIMEOUT)
    list(workers.read(keys()))
    for process in workers._processes():
        stop(process.pid)
    assert_closes_at_once(workers)


def test_other_exceptions_keep_their_meaning():
    def accident():
        raise ConfigError("data.root=/gone is refused")

    workers = Workers(Reader(accident), "train", 2, TIMEOUT)
    with pytest.raises(ConfigError, match="data.root=/gone is refused"):
        list(workers.read(keys()))
    workers.close()


def test_signals_to_the_process_group_leave_workers_alone():
    """Check that workers ignore Slurm's --signal=USR1; if one died, the run would end without a checkpoint."""

    def accident():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)

    workers = Workers(Reader(accident), "train", 1, TIMEOUT)
    assert len(list(workers.read(keys()))) == 7
    workers.close()


ORPHANED = """
import os, signal, sys, time
sys.path.insert(0, "tests")
from making_data import Reader, keys
from sasa_train.data.workers import Workers
main = os.getpid()

def lose_connection():
    for is_orphaned in (False, True):
        while (os.getppid() != main) != is_orphaned:
            time.sleep(0.01)
        error = ConnectionResetError("orphaned" if is_orphaned else "not orphaned")
        sys.excepthook(type(error), error, None)  # as multiprocessing.resource_sharer does
        if not is_orphaned:
            os.kill(main, signal.SIGKILL)

list(Workers(Reader(lose_connection), "train", 1, timeout=60.0).read(keys()))
"""


def test_a_worker_whose_run_was_killed_prints_no_traceback():
    # The pipes stay open until the worker, too, has ended.
    run = subprocess.run([sys.executable, "-c", ORPHANED], capture_output=True, text=True, timeout=100)
    assert run.returncode == -signal.SIGKILL
    assert run.stderr == "ConnectionResetError: not orphaned\n"


def test_decoding_into_memory_is_watched_too(image_folder, monkeypatch):
    monkeypatch.setattr(reading, "read_or_replace", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    overrides = ("data=image_folder", f"data.root={image_folder}", "data.image_size=16", "trainer.global_batch_size=9")
    with pytest.raises(DataWorkerError, match=r"train: data worker \d+ was killed .*/0.png"):
        build_loaders(config_for(*overrides, "data.num_workers=1"), CPU)


SUSPENDED = """
import sys, time
sys.path.insert(0, "tests")
from making_data import Reader, keys
from sasa_train.data.workers import Workers
workers = Workers(Reader(lambda: time.sleep(1.5)), "train", 1, timeout=3.0)
for _ in workers.read(keys()):
    print("read", flush=True)
workers.close()
"""


def test_a_job_that_was_suspended_as_a_whole_goes_on():
    """Check that a job suspended by a scheduler for hours continues, without treating its workers as hanging."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", SUSPENDED]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "read\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "read\n" * 6 and process.returncode == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_run_whose_worker_is_killed_fails_cleanly_and_goes_on_with_the_same_command(tmp_path, in_process):
    root = make_image_folder(tmp_path / "images")
    run = ("data=image_folder", f"data.root={root}", "data.image_size=72", "model.stem=attention", *SMALL_RUN)
    run = (*run, "trainer.epochs=40", "data.num_workers=1", "trainer.checkpoint_every_steps=2")
    process = start(tmp_path, *run)
    wait_for(lambda: (tmp_path / "out/bad/checkpoints/last.pt").exists())
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in said
    assert "was killed by SIGKILL" in said and "Run the same command again to continue" in said
    assert "continues" in in_process("train", *run[:-3], "trainer.epochs=40", "data.num_workers=0").stdout
