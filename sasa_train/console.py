"""What a run says, through its first process. A full disk, or a reader that went away, does not end a run."""

import contextlib
import sys

from tqdm import tqdm

from sasa_train.ranks import rank


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
