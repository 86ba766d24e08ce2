"""Worker processes that read micro-batches in order; if one is killed or hangs, the run stops with an error message."""

import atexit
import math
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from sasa_train.config import own_code
from sasa_train.data.plan import MicroBatch
from sasa_train.data.reading import Reader
from sasa_train.processes.ranks import local_world_size
from sasa_train.refusal import ConfigError, ExpectedFailure, shorten
from sasa_train.signals import SIGNALS, name_of
from sasa_train.terminal import some

PREFETCH = 2  # micro-batches that each worker prepares in advance
PATIENCE = 2.0  # seconds for workers to exit before they are killed
DEATH_THROES = 0.5  # maximum seconds between a worker's last answer and its exit code
STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or network"}  # Linux's state letters
REASONS: dict[int, str] = {
    signal.SIGKILL: ", perhaps for want of memory",
    signal.SIGBUS: ", perhaps for want of shared memory",
}
SHM = Path("/dev/shm")  # shared memory, which holds the queued batches
END = object()


class DataWorkerError(ExpectedFailure):
    """Raised if a data worker was killed or hangs; the message lists its images and a remedy. Exit code 1."""


class Workers:
    """Runs `reader` in `num_workers` processes (if 0, in the main one); `read` starts them and `close` stops them.

    A thread kills all workers if waiting for them takes too long.
    """

    # To take a batch out of shared memory, the main process requests a file descriptor from the worker that created it,
    # and a stopped worker never answers. Only the worker's exit ends that wait, so the thread kills the workers instead
    # of raising an exception.

    def __init__(self, reader: Reader, split: str, num_workers: int, timeout: float, pin_memory: bool = False):
        self.reader, self.pin_memory = reader, pin_memory
        self.split, self.num_workers, self.timeout = split, num_workers, timeout
        self._keys: Iterator[MicroBatch] = iter(())
        self._handed: deque[MicroBatch] = deque()  # assigned to workers and not returned yet
        self._num_read = 0  # micro-batches read in this pass
        self._num_waits, self._is_waiting, self._is_closed = 0, False, threading.Event()
        self._cause = ""  # why a wait was aborted
        self._loader: Any = None
        self._results: Any = None  # the loader's iterator, while workers are running
        atexit.register(self._kill)  # Python would wait for the workers at exit

    def read(self, keys: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield each key together with the reader's result for it.

        Raises:
            DataWorkerError: a worker was killed or returned nothing for `timeout` seconds.
            ConfigError: the user's own code failed or cannot be sent to the workers.
            ServerError: images are behind a URL, and the server failed.
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
            if isinstance(content, ConfigError | ExpectedFailure):
                raise content
            yield micro, content

    def _start(self) -> Iterator[Any]:
        if self._results is not None:
            with self._watched():
                return iter(self._loader)  # waits until the workers have finished the tasks of an abandoned pass
        if self.num_workers:
            _check_sendable(self.reader, self.num_workers)
        self._loader = DataLoader(
            _Stamped(self.reader),
            sampler=_Handed(self),
            batch_size=None,  # a key is a whole micro-batch
            collate_fn=unchanged,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
            worker_init_fn=partial(begin_worker, modules=own_code.imported()),
            generator=torch.Generator(),  # otherwise it would draw a seed from the global generator, which dropout uses
        )
        if not self.num_workers:
            return iter(self._loader)
        self._results = unreported(iter(self._loader))
        self._cause = ""
        self._is_closed.clear()
        threading.Thread(target=self._limit_waits, daemon=True).start()
        return self._results

    def close(self) -> None:
        """Shut down the worker processes and kill those that do not exit."""
        if self._results is not None:
            # In a thread, because the DataLoader may wait a long time for a stopped worker.
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
        """Limit the time spent waiting for workers; convert errors from dead or hanging workers to DataWorkerError."""
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
        """Kill the workers if waiting for them takes more than `timeout` seconds; this method runs in a thread."""
        # One-second ticks are counted, so that an hour during which the whole job was suspended counts as one tick.
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
        """Describe the workers that are stopped or, if none are, the worker whose result is due next."""
        workers = self._processes()
        suspects = [worker for worker in workers if _state(worker).startswith("stopped")]
        if not suspects and self._handed:
            suspects = [workers[self._num_read % len(workers)]]  # the DataLoader assigns micro-batches round-robin
        return ", ".join(f"data worker {worker.pid} is {_state(worker)}" for worker in suspects or workers)

    def _death(self) -> str:
        """Describe which workers died and how, or return "" if all are alive."""
        workers = self._processes()
        # A worker's exit code becomes available slightly after the error that its death causes here.
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
    """Make a DataLoader's iterator check for dead workers only while it waits for a batch (every few seconds)."""
    # The DataLoader's SIGCHLD handler would raise at any point, perhaps while the main process writes a checkpoint.
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False  # otherwise it would remove the ids again when it ends
    return iterator


def queue_bytes(num_workers: int, batch_size: int, num_images: int, image_bytes: int) -> int:
    """Return the size in bytes of all queued or unfinished batches, at most the data set's size."""
    return min(num_workers * (PREFETCH + 1) * batch_size, num_images) * image_bytes


def check_shared_memory(needed: int, num_workers: int, remedy: str = "") -> None:
    """Check that shared memory has `needed` bytes free for each process on this machine.

    Raises:
        ConfigError: too little memory is free; the message suggests `remedy` in addition to the general remedies.
    """
    # Containers often have little shared memory, and a worker that fills it is killed by SIGBUS. Only Linux shows how
    # much is free.
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
    """The DataLoader's sampler, which yields the keys of `owner` and records each one as handed out."""

    def __init__(self, owner: Workers):
        self.owner = owner

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in self.owner._keys:
            self.owner._handed.append(micro)
            yield micro


class _Stamped(Dataset):
    """The DataLoader's dataset, which returns a micro-batch's first index and the reader's result."""

    # It returns only the first index, because a worker may be killed while it writes its answer to a pipe, and only
    # messages of up to a few kilobytes are written atomically.

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, micro: MicroBatch) -> tuple[int, Any]:
        try:
            return int(micro.indices[0]), self.reader(micro)
        except (ConfigError, ExpectedFailure) as error:  # the DataLoader would put a traceback into its message
            return int(micro.indices[0]), error


def unchanged(read: Any) -> Any:
    """Return `read` unchanged; used as the DataLoader's collate function, because the reader already makes batches."""
    return read


def begin_worker(_worker: int, modules: Sequence[str]) -> None:
    """Make a worker ignore Ctrl-C and a scheduler's warning signals, which are sent to the whole process group.

    modules: the user's own, which are imported here as well, so that errors name the user's file and line.
    """
    # Only the main process handles these signals.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _print_unless_orphaned
    own_code.import_again(modules)


def _print_unless_orphaned(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    # The thread that hands over batches calls this hook. If the main process is killed meanwhile, the connection ends,
    # and so does this worker a moment later.
    parent = multiprocessing.parent_process()
    if not isinstance(error, ConnectionError | EOFError) or parent is None or parent.is_alive():
        sys.__excepthook__(kind, error, traceback)


def _check_sendable(reader: Reader, num_workers: int) -> None:
    """Raise ConfigError if the user's own data set or transform cannot be sent to a worker."""
    if multiprocessing.get_start_method() == "fork":  # its memory is the main process's
        return
    try:
        ForkingPickler.dumps(reader)
    except Exception as error:  # pickle has no common base class: PicklingError, AttributeError, TypeError, ...
        raise ConfigError(
            f"data.num_workers={num_workers}: your own data set or transform cannot be sent to a data worker "
            f"({shorten(error)}); define its classes and functions at the top of a module and open files in "
            "__getitem__, or use data.num_workers=0"
        ) from error


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    return f"was killed by {name_of(-exit_code)}{REASONS.get(-exit_code, '')}"


def _state(process: BaseProcess) -> str:
    try:
        letter = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # not Linux
        letter = ""
    return STATES.get(letter, "alive")
