"""SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and a time limit ask a run to stop at the next safe place.

Schedulers warn with any of the first, third and fourth. A second SIGINT ends the run at once.
"""

import math
import os
import signal
import sys
import time
from types import FrameType

TIME_LIMIT = 1  # `asked` for a time limit; no signal of SIGNALS has this number
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def ignore_until_the_end() -> None:
    """Ignore signals while Python ends, for a second or two, so that none changes the exit code any more."""
    # Ignored, not handled: Python removes its own handlers before the last destructors have run.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or a reader that went away: Python would make it exit code 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Interrupted(BaseException):
    """A stop was requested while there was nothing to save yet."""


class StopRequest:
    """Remembers the first signal. Before `begin_training` there is nothing to save, so it also raises Interrupted."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first that came
        self._num_interrupts = 0
        self.deadline = math.inf
        self._start = time.monotonic()
        self._process = os.getpid()
        self._is_training = False
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def begin_training(self) -> None:
        """Note that there is something to save from now on: a step, or an evaluation."""
        self._is_training = True

    def set_max_hours(self, hours: float | None) -> None:
        """Request a stop so many hours after this process began."""
        self.deadline = math.inf if hours is None else self._start + 3600 * hours

    def requested(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline

    @property
    def asked(self) -> int:
        """The number of the signal that requested a stop, TIME_LIMIT, or 0 for none yet."""
        return int(self.signal or (TIME_LIMIT if self.requested() else 0))

    def hear(self, asked: int) -> None:
        """Take over another process's request, its `asked`."""
        if asked == TIME_LIMIT:
            self.deadline = -math.inf
        elif asked:
            self.signal = self.signal or signal.Signals(asked)

    @property
    def reason(self) -> str:
        return self.signal.name if self.signal is not None else "trainer.max_hours"

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hand_on(self) -> bool:
        """Give the signal that stopped the run to the handler before ours; return whether it was a launcher's.

        A launcher's handler may requeue its job and end the process. Python's own handlers do not count.
        """
        if self.signal is None:
            return False
        handler = self._previous[self.signal]
        if not callable(handler) or handler is signal.default_int_handler:
            return False
        handler(self.signal, None)
        return True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker, forked before it learnt to ignore signals
            return
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1:
            os._exit(128 + number)
        self.signal = self.signal or signal.Signals(number)
        if not self._is_training:
            raise Interrupted
