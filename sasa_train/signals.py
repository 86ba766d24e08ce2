"""Stop a run at the next safe point on SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, or when it reaches its time limit.

A hook of the user's own may ask for it, too. Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 as a warning. A second SIGINT
ends the run immediately.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

TIME_LIMIT = 1  # the value of `asked` for a time limit; none of SIGNALS has this number
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def name_of(number: int) -> str:
    """Return a signal's name; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def ignore_until_the_end() -> None:
    """Ignore signals while Python exits, which takes a second or two, so that they cannot change the exit code."""
    # They are ignored instead of handled, because Python removes its own handlers before the last destructors run.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk or a closed pipe; otherwise, Python would exit with code 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Interrupted(BaseException):
    """Raised if a stop is requested before there is anything to save."""


class StopRequest:
    """Records the first signal; before `begin_training`, when there is nothing to save, it also raises Interrupted."""

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS, ends_process: bool = True) -> None:
        """Handle `signals` until `restore` is called; a second SIGINT ends the process or raises KeyboardInterrupt."""
        self.signal: signal.Signals | None = None  # the first signal received
        self._num_interrupts = 0
        self.asked_by = ""  # the hook that asked to stop, known to all processes
        self.deadline = math.inf
        self._start = time.monotonic()
        self._process = os.getpid()
        self._is_training = False
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        self._ends_process = ends_process

    @property
    def came_early(self) -> bool:
        """Whether a signal has raised Interrupted, as there was nothing to save yet."""
        return self.signal is not None and not self._is_training

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Raise Interrupted again where other code has made another error of it, as its cleanup may fail half-way."""
        try:
            yield
        except Exception as error:
            if self.came_early:
                raise Interrupted from error
            raise

    def begin_training(self) -> None:
        """Record that a step or an evaluation can now be saved, so that a signal no longer raises Interrupted."""
        self._is_training = True

    def set_max_hours(self, hours: float | None) -> None:
        """Request a stop `hours` hours after this process started."""
        self.deadline = math.inf if hours is None else self._start + 3600 * hours

    def requested(self) -> bool:
        return bool(self.asked_by) or self.signal is not None or time.monotonic() >= self.deadline

    @property
    def asked(self) -> int:
        """The number of the signal that requested a stop, TIME_LIMIT if time ran out, or 0 if no stop was requested."""
        return int(self.signal or (TIME_LIMIT if self.requested() else 0))

    def hear(self, asked: int) -> None:
        """Adopt a stop request from another process; the argument is that process's `asked` value."""
        if asked == TIME_LIMIT:
            self.deadline = -math.inf
        elif asked:
            self.signal = self.signal or signal.Signals(asked)

    @property
    def reason(self) -> str:
        if self.asked_by:
            return self.asked_by
        if self.signal == signal.SIGINT:
            return "Ctrl-C (SIGINT)"
        return self.signal.name if self.signal is not None else "trainer.max_hours"

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hand_on(self) -> bool:
        """Pass the signal that stopped the run to a launcher's earlier handler, if any; return whether there was one.

        A launcher's handler may requeue its job and end the process. Python's default handlers are not called.
        """
        if self.signal is None:
            return False
        handler = self._previous[self.signal]
        if not callable(handler) or handler is signal.default_int_handler:
            return False
        handler(self.signal, None)
        return True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data worker that does not ignore signals yet
            return
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1:
            if not self._ends_process:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.signal = self.signal or signal.Signals(number)
        if not self._is_training:
            raise Interrupted
