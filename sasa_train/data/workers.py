"""Processes that read micro-batches, in order. One that is killed or hangs ends the run with a message, not a hang."""

import atexit
import math
import multiprocessing.connection
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from sasa_train.data.datasets import some
from sasa_train.data.plan import MicroBatch
from sasa_train.data.reading import Reader
from sasa_train.processes.ranks import local_world_size
from sasa_train.refusal import ConfigError, ExpectedFailure
from sasa_train.signals import SIGNALS

PREFETCH = 2  # micro-batches per worker that wait for the main process
PATIENCE = 2.0  # seconds for workers to end by themselves, before they are killed
DEATH_THROES = 0.5  # seconds at most between a worker's last answer and its exit code
STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or network"}  # Linux's letters
REASONS = {signal.SIGKILL: ", perhaps for want of memory", signal.SIGBUS: ", perhaps for want of shared memory"}
SHM = Path("/dev/shm")  # shared memory, where batches wait
END = object()


class DataWorkerError(ExpectedFailure):
    """A data worker was killed or hangs: the message names it, its images and the remedy. Exit code 1."""


class Workers:
    """`num_workers` processes that `reader` runs in (0: the main process), started by `read` and kept until `close`.

    A thread kills them all where a wait for them takes too long.
    """

    # To take a batch out of shared memory, the main process asks the worker that made it for a file descriptor, and a
    # stopped worker never answers. Nothing but its end ends that wait, so the thread kills workers instead of raising.

    def __init__(self, reader: Reader, split: str, num_workers: int, timeout: float, pin_memory: bool = False):
        self.reader, self.pin_memory = reader, pin_memory
        self.split, self.num_workers, self.timeout = split, num_workers, timeout
        self._keys: Iterator[MicroBatch] = iter(())
        self._handed: deque[MicroBatch] = deque()  # given to workers, and not back yet
        self._num_read = 0  # micro-batches of this pass
        self._num_waits, self._is_waiting, self._is_closed = 0, False, threading.Event()
        self._cause = ""  # why a wait was ended
        self._loader: Any = None
        self._results: Any = None  # its iterator, while there are workers
        atexit.register(self._kill)  # at its end Python would wait for them

    def read(self, keys: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield each key with what the reader makes of it.

        Raises:
            DataWorkerError: a worker was killed, or gave nothing for `timeout` seconds.
        """
        self._keys, self._num_read = keys, 0
        self._handed.clear()
        results = self._start()
        while True:
            with self._watched():
                result: Any = next(results, END)
            if result is END:
                return
            micro, (first, content) = self._handed.popleft(), result
            self._num_read += 1
            if first != micro.indices[0]:
                raise RuntimeError(f"image {first} came out of the data workers instead of {micro.indices[0]}")
            yield micro, content

    def _start(self) -> Iterator[Any]:
        if self._results is not None:
            with self._watched():
                return iter(self._loader)  # waits until the workers have finished what an abandoned pass left
        self._loader = DataLoader(
            _Stamped(self.reader),
            sampler=_Handed(self),
            batch_size=None,  # a key is a whole micro-batch
            collate_fn=unchanged,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it would draw a seed from the global one, which dropout uses
        )
        if not self.num_workers:
            return iter(self._loader)
        self._results = unreported(iter(self._loader))
        self._cause = ""
        self._is_closed.clear()
        threading.Thread(target=self._limit_waits, daemon=True).start()
        return self._results

    def close(self) -> None:
        """End the worker processes, and kill those that ignore it."""
        if self._results is not None:
            # In a thread, because the DataLoader may wait long for a stopped worker.
            ending = threading.Thread(target=self._results._shutdown_workers, daemon=True)
            ending.start()
            ending.join(PATIENCE)
        self._kill()
        self._is_closed.set()
        self._results = None
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        for worker in self._processes():
            worker.kill()

    def _processes(self) -> list[BaseProcess]:
        return [] if self._results is None else self._results._workers

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Limit a wait for the workers; an exception that dead or hanging workers caused becomes a DataWorkerError."""
        self._num_waits, self._is_waiting = self._num_waits + 1, True
        try:
            yield
        except Exception as error:
            if self.num_workers and (cause := self._cause or self._death()):
                self._kill()
                raise DataWorkerError(self._message(cause)) from error
            raise
        finally:
            self._is_waiting = False

    def _limit_waits(self) -> None:
        """Kill the workers after a wait of `timeout` seconds; runs in a thread."""
        # Ticks of a second are counted, so that an hour for which the whole job was suspended is only one of them.
        tick = min(1.0, self.timeout / 4)
        wait, num_ticks = 0, 0
        while num_ticks * tick < self.timeout:
            if self._is_closed.wait(tick):
                return
            num_ticks = num_ticks + 1 if self._is_waiting and wait == self._num_waits else 0
            wait = self._num_waits
        late = f"nothing came for data.worker_timeout={self.timeout:g} seconds ({self._suspects()})"
        self._cause = self._death() or late
        self._kill()

    def _suspects(self) -> str:
        """Describe the workers that are stopped, or else the one whose micro-batch is waited for."""
        workers = self._processes()
        suspects = [worker for worker in workers if _state(worker).startswith("stopped")]
        if not suspects and self._handed:
            suspects = [workers[self._num_read % len(workers)]]  # the DataLoader gives them micro-batches in turn
        return ", ".join(f"data worker {worker.pid} is {_state(worker)}" for worker in suspects or workers)

    def _death(self) -> str:
        """Tell which workers died, and how; "" where all are alive."""
        workers = self._processes()
        # A worker's exit code comes a little later than the error that its end causes here.
        gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], DEATH_THROES)
        dead = [worker for worker in workers if worker.sentinel in gone]
        for worker in dead:
            worker.join(DEATH_THROES)
        return ", ".join(f"data worker {worker.pid} {_ending(worker.exitcode)}" for worker in dead)

    def _message(self, cause: str) -> str:
        waited_for = ""
        if self._handed:
            names = some([self.reader.images.name(int(i)) for i in self._handed[0].indices])
            waited_for = f" while {names} were waited for"
        fewer, longer = f"data.num_workers={self.num_workers // 2}", f"data.worker_timeout={2 * self.timeout:g}"
        return (
            f"{self.split}: {cause}{waited_for}. Where memory is short, use {fewer} or a smaller micro-batch "
            f"(trainer.micro_batch_size); where the disk is slow, {longer}. Run the same command again to continue"
        )


def unreported(iterator: Any) -> Any:
    """Make a DataLoader's iterator notice dead workers in its own waits alone, within seconds."""
    # The DataLoader's handler of SIGCHLD would raise wherever the main process is, perhaps in writing a checkpoint.
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False  # else it would remove them once more at its end
    return iterator


def queue_bytes(num_workers: int, batch_size: int, num_images: int, size: int) -> int:
    """Return the bytes of each worker's waiting uint8 [B, S, S, 3] and of one in work; at most those of the set."""
    return min(num_workers * (PREFETCH + 1) * batch_size, num_images) * 3 * size**2


def check_shared_memory(needed: int, num_workers: int, remedy: str = "") -> None:
    """Refuse to start where shared memory has not `needed` bytes free for each process on this machine.

    Raises:
        ConfigError: with `remedy` beside those that always help.
    """
    # A worker that fills shared memory, of which a container may have little, dies of SIGBUS. Only Linux shows it.
    if not num_workers or sys.platform != "linux" or not SHM.is_dir():
        return
    free, needed = shutil.disk_usage(SHM).free, needed * local_world_size()
    if needed > free:
        gigabytes = math.ceil(1.5 * needed / 2**30)
        raise ConfigError(
            f"data.num_workers={num_workers}: their queues take up to {needed / 2**20:,.0f} MiB of shared memory, but "
            f"{SHM} has {free / 2**20:,.0f} MiB free; give the container more (docker run --shm-size={gigabytes}g), "
            f"or use data.num_workers={num_workers * free // needed}{remedy}"
        )


class _Handed:
    """The DataLoader's sampler: it hands out its owner's keys, and notes them."""

    def __init__(self, owner: Workers):
        self.owner = owner

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in self.owner._keys:
            self.owner._handed.append(micro)
            yield micro


class _Stamped(Dataset):
    """The DataLoader's dataset: what the reader makes of a micro-batch, with the first of its indices."""

    # Not with all indices: a pipe holds a message of a few kilobytes whole or not at all, even where the worker is
    # killed while it writes.

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, micro: MicroBatch) -> tuple[int, Any]:
        return int(micro.indices[0]), self.reader(micro)


def unchanged(read: Any) -> Any:
    """Serve as the DataLoader's collate function: batches are made where they are read."""
    return read


def ignore_signals(_worker: int) -> None:
    """Prepare a worker: it ignores Ctrl-C and a scheduler's warning, which reach the whole process group."""
    # The main process alone decides what follows.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    number = signal.Signals(-exit_code)
    return f"was killed by {number.name}{REASONS.get(number, '')}"


def _state(process: BaseProcess) -> str:
    try:
        letter = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # not Linux
        letter = ""
    return STATES.get(letter, "alive")
