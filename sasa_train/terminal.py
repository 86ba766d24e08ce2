"""What a terminal shows: messages through the first process, names escaped, exit codes.

Names of files and classes come from disks and archives, and may hold anything. A full disk, or a reader that went away,
does not end a run.
"""

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from sasa_train.processes.ranks import rank

# Done, or done before; anything unexpected; a config or input; stopped and ready to continue.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75


def printable(text: str) -> str:
    """`text` with control characters and what no terminal can show escaped: a file's name must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Likewise, but for a message's own line breaks: names must be `printable` before they enter one."""
    return "\n".join(printable(line) for line in text.split("\n"))


def say(text: str) -> None:
    """On stdout, above a progress bar."""
    if rank() != 0:
        return
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """On stderr, above a progress bar."""
    if rank() != 0:
        return
    with contextlib.suppress(OSError):
        tqdm.write(f"WARNING: {text}", file=sys.stderr)


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 04 s or 5 s."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def fail(error: Exception) -> int:
    """Print a refusal the way every command does, with what it quotes from a disk escaped; returns REFUSED."""
    path = Path(sys.argv[0])
    command = path.parent.name if path.stem == "__main__" else path.stem
    print(printable_lines(f"{command}: {error}"), file=sys.stderr)
    return REFUSED
