"""Terminal messages of the first process, escaping of names, and exit codes.

File and class names come from disks and archives and may contain any characters. Output errors, such as a full disk or
a closed pipe, do not stop a run.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from sasa_train.processes.ranks import rank

# Exit codes: done (now or earlier); failed; config or input refused; stopped, and can be continued.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
MAX_NAMES = 5  # maximum number of names shown from a long list


def printable(value: object) -> str:
    """Escape control and other unprintable characters, so that a file name cannot move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of a message; names in the message must already be escaped."""
    return "\n".join(printable(line) for line in text.split("\n"))


def some(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first MAX_NAMES names, escaped, followed by the number of remaining names."""
    rest = len(names) - MAX_NAMES
    return separator.join(map(printable, names[:MAX_NAMES])) + (f" and {rest:,} more" if rest > 0 else "") or "none"


def say(text: str, file: TextIO | None = None) -> None:
    """Print to stdout, or to `file`, above any progress bar."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(text, file=file or sys.stdout)
            (file or sys.stdout).flush()


def warn(text: str) -> None:
    """Print a warning to stderr, above any progress bar."""
    say(f"WARNING: {text}", sys.stderr)


def duration(seconds: float) -> str:
    """Format a number of seconds as a duration, such as 1 h 02 min, 3 min 04 s or 5 s."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def fail(error: Exception) -> int:
    """Print an error to stderr in the format of all commands, with unprintable characters escaped; return REFUSED."""
    path = Path(sys.argv[0])
    command = path.parent.name if path.stem == "__main__" else path.stem
    print(printable_lines(f"{command}: {error}"), file=sys.stderr)
    return REFUSED
