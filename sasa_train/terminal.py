"""Messages of the first process on a terminal, escaped names, exit codes.

Names of files and classes come from disks and archives, and may hold anything. A full disk, or a reader that went away,
does not end a run.
"""

import contextlib
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from sasa_train.processes.ranks import rank

# Done, or done before; anything unexpected; a config or input; stopped and ready to continue.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75


def printable(value: object) -> str:
    """Escape control characters and what no terminal can show: a file's name must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def printable_lines(text: str) -> str:
    """Escape all but a message's own line breaks: names must be `printable` before they enter a message."""
    return "\n".join(printable(line) for line in text.split("\n"))


def say(text: str, file: TextIO | None = None) -> None:
    """Print on stdout, or into `file`, above a progress bar."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(text, file=file or sys.stdout)
            (file or sys.stdout).flush()


def warn(text: str) -> None:
    """Print on stderr, above a progress bar."""
    say(f"WARNING: {text}", sys.stderr)


def duration(seconds: float) -> str:
    """Write seconds as 1 h 02 min, 3 min 04 s or 5 s."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def fail(error: Exception) -> int:
    """Print a refusal as every command does, with quoted names escaped; return REFUSED."""
    path = Path(sys.argv[0])
    command = path.parent.name if path.stem == "__main__" else path.stem
    print(printable_lines(f"{command}: {error}"), file=sys.stderr)
    return REFUSED
