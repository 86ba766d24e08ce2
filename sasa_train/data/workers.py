"""Processes that read micro-batches, in order; one that is killed or hangs ends the run with a message, not a hang.

A wait is ended by killing all workers, because it may be one that nothing else ends: to take a batch out of shared
memory, the main process asks the worker that made it for a file descriptor, and a stopped worker never answers.
"""

import atexit
import multiprocessing.connection
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from sasa_train.data.datasets import ImageSet
from sasa_train.data.plan import MicroBatch
from sasa_train.data.reading import Read, read_fitted
from sasa_train.signals import SIGNALS
from sasa_train.terminal import printable

PREFETCH = 2  # micro-batches that wait for the main process, a worker
NUM_NAMES = 3  # images named in a message
PATIENCE = 2.0  # seconds for workers to end by themselves, before they are killed
DEATH_THROES = 0.5  # seconds at most between a worker's last answer and its exit code
STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or network"}  # of Linux
REASONS = {signal.SIGKILL: ", perhaps for want of memory", signal.SIGBUS: ", perhaps for want of shared memory"}
END = object()


class DataWorkerError(Exception):
    """A data worker was killed or hangs: which one, what was waited for, and what to do. Exit code 1."""


class Reader(Protocol):
    """Reads a micro-batch, in a worker."""

    images: ImageSet

    def __call__(self, micro: MicroBatch) -> Read: ...


@dataclass
class PlainReader:
    """Reads a micro-batch as val sees it; what cannot be read is left out, or replaced in `num_tries`."""

    images: ImageSet
    size: int
    num_tries: int

    def __call__(self, micro: MicroBatch) -> Read:
        return read_fitted(self.images, micro.indices, self.size, self.num_tries)


class Workers:
    """`num_workers` processes (0: none) that `reader` runs in, made at the first `read` and kept until `close`."""

    def __init__(self, reader: Reader, split: str, num_workers: int, timeout: float, pin_memory: bool = False):
        self.images, self.split, self.num_workers, self.timeout = reader.images, split, num_workers, timeout
        self._keys: Iterator[MicroBatch] = iter(())
        self._handed: deque[MicroBatch] = deque()  # to workers, and not back yet
        self._num_waits, self._is_waiting, self._is_closed = 0, False, threading.Event()
        self._cause = ""  # why a wait was ended
        self._loader = DataLoader(
            _Stamped(reader),
            sampler=_Handed(self),
            batch_size=None,  # a key is a micro-batch
            collate_fn=unchanged,
            num_workers=num_workers,
            prefetch_factor=PREFETCH if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it would draw from the global one, which dropout uses
        )
        atexit.register(self._kill)  # Python waits for them at its end

    def read(self, keys: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Any]]:
        """Each key with what the reader makes of it.

        Raises:
            DataWorkerError: a worker was killed, or gave nothing for `timeout` seconds.
        """
        self._keys = keys
        self._handed.clear()
        results = self._start()
        while (result := self._next(results)) is not END:
            micro, (first, content) = self._handed.popleft(), result
            if first != micro.indices[0]:
                raise RuntimeError(f"image {first} came out of the data workers instead of {micro.indices[0]}")
            yield micro, content

    def _start(self) -> Iterator[Any]:
        if self._iterator is not None:
            with self._watched():
                return iter(self._loader)  # which waits until all workers are through with what was left
        results: Any = iter(self._loader)
        if self.num_workers:
            # PyTorch's handler of SIGCHLD would raise wherever the main process is; here a wait ends within seconds.
            signal_handling._remove_worker_pids(id(results))
            results._worker_pids_set = False
            self._cause = ""
            self._is_closed.clear()
            threading.Thread(target=self._limit_waits, daemon=True).start()
        return results

    def _next(self, results: Iterator[Any]) -> Any:
        if not self.num_workers:
            return next(results, END)
        with self._watched():
            return next(results, END)

    def close(self) -> None:
        """End the worker processes; those that ignore even that are killed."""
        iterator = self._iterator
        if iterator is not None:
            ending = threading.Thread(target=iterator._shutdown_workers, daemon=True)
            ending.start()
            ending.join(PATIENCE)
        self._kill()
        self._is_closed.set()
        self._loader._iterator = None
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        for worker in self._processes():
            worker.kill()

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator if self.num_workers else None

    def _processes(self) -> list[BaseProcess]:
        return [] if self._iterator is None else self._iterator._workers

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A wait for the workers, which ends; where they are the reason for an exception, it is DataWorkerError."""
        self._num_waits, self._is_waiting = self._num_waits + 1, True
        try:
            yield
        except Exception as error:
            if cause := self._cause or self._death():
                self._kill()
                raise DataWorkerError(self._message(cause)) from error
            raise
        finally:
            self._is_waiting = False

    def _limit_waits(self) -> None:
        """A thread that kills the workers after a wait of `timeout` seconds.

        It counts ticks of a second, so that an hour for which the whole job was suspended is one of them.
        """
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
        """The workers that are stopped, or else the one whose micro-batch is waited for."""
        iterator, workers = self._iterator, self._processes()
        suspects = [worker for worker in workers if _state(worker).startswith("stopped")]
        awaited = iterator._task_info.get(iterator._rcvd_idx)
        if not suspects and awaited:
            suspects = [workers[awaited[0]]]
        return ", ".join(f"data worker {worker.pid} is {_state(worker)}" for worker in suspects or workers)

    def _death(self) -> str:
        """Which workers are dead, and of what; "" where all are alive."""
        workers = self._processes()
        gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], DEATH_THROES)
        dead = [worker for worker in workers if worker.sentinel in gone]
        for worker in dead:
            worker.join(DEATH_THROES)
        return ", ".join(f"data worker {worker.pid} {_ending(worker.exitcode)}" for worker in dead)

    def _message(self, cause: str) -> str:
        waited_for = ""
        if self._handed:
            indices = self._handed[0].indices
            names = ", ".join(printable(self.images.name(int(i))) for i in indices[:NUM_NAMES])
            rest = len(indices) - NUM_NAMES
            waited_for = f" while {names}{f' and {rest:,} more' if rest > 0 else ''} were waited for"
        fewer, longer = f"data.num_workers={self.num_workers // 2}", f"data.worker_timeout={2 * self.timeout:g}"
        return (
            f"{self.split}: {cause}{waited_for}. Where memory is short, use {fewer} or a smaller micro-batch "
            f"(trainer.micro_batch_size); where the disk is slow, {longer}. Run the same command again to continue"
        )


class _Handed:
    """The DataLoader's sampler: hands out its owner's keys, and notes them."""

    def __init__(self, owner: Workers):
        self.owner = owner

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in self.owner._keys:
            self.owner._handed.append(micro)
            yield micro


class _Stamped(Dataset):
    """What the reader makes of a micro-batch, with the first of its indices.

    Not with all of them: a message of a few kilobytes is in the pipe whole or not at all, even of a worker that is
    killed while it writes.
    """

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, micro: MicroBatch) -> tuple[int, Any]:
        return int(micro.indices[0]), self.reader(micro)


def unchanged(read: Any) -> Any:
    """The DataLoader's collate function: batches are made where they are read."""
    return read


def ignore_signals(_worker: int) -> None:
    """Ctrl-C and a scheduler's warning reach the whole process group: the main process alone decides what follows."""
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
