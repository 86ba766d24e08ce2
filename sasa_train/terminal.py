"""Terminal messages of the first process, escaping of names, and exit codes.

File and class names come from disks and archives and may contain any characters. Output errors, such as a full disk or
a closed pipe, do not stop a run.
"""

import contextlib
import gc
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from sasa_train.processes.ranks import rank
from sasa_train.refusal import is_of_disk

# Exit codes: done (now or earlier); failed; config or input refused; stopped, and can be continued.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
MAX_NAMES = 5  # maximum number of names shown from a long list
NAMED = re.compile(r"\S+(?: \S+)? {2,}(?=\S)")  # a name before a text, as in "as set      ..."
COMMAND = re.compile(r"sasa-|tensorboard |torchrun |python -m ")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how OpenMP's threads wait


def escape_unknown_letters() -> None:
    """Have stdout escape letters that its encoding lacks, as stderr does; a command calls this first."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(value: object) -> str:
    """Escape control and other unprintable characters, so that a file name cannot move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of a message; names in the message must already be escaped."""
    return "\n".join(printable(line) for line in text.split("\n"))


def fitting(parts: Sequence[tuple[int, str]], width: int | None, separator: str = "  ") -> str:
    """Join texts, without the least important ones if all of them are wider than `width` columns (None: no limit).

    parts: pairs of an importance and a text; empty texts are left out, and those of importance 0 are always kept.
    """
    kept = [part for part in parts if part[1]]
    while width is not None and len(separator.join(text for _, text in kept)) > width:
        least = max(kept, key=lambda part: part[0])
        if least[0] == 0:
            break
        kept.remove(least)
    return separator.join(text for _, text in kept)


def columns(file: TextIO) -> int | None:
    """Return the number of columns of the terminal that `file` is, or None if it is not a terminal."""
    try:
        return (os.get_terminal_size(file.fileno()).columns or 80) if file.isatty() else None
    except (OSError, ValueError):  # as in notebooks
        return None


def wrapped(text: str, file: TextIO) -> str:
    """Break lines between words where the terminal that `file` is, if any, would break them within words.

    A text after a name, as in "first  a text", goes on below itself. Rows of tables stay as they are, and commands,
    which are for pasting, too, on lines of their own.
    """
    width = columns(file)
    return text if width is None else "\n".join(part for line in text.split("\n") for part in _broken(line, width))


def _broken(line: str, width: int) -> list[str]:
    name = NAMED.match(line)
    indent = name.end() if name else len(line) - len(line.lstrip())
    head, rest = line[:indent], line[indent:]
    if len(line) <= width or "  " in rest.strip():
        return [line]
    if COMMAND.match(rest):
        return [head.rstrip(), rest] if name else [rest]
    if max(map(len, rest.split())) > width - indent:  # a long path, which has more room further left
        indent = min(indent, 2)
    return textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def with_command(text: str, command: str) -> str:
    """Return a text that ends with a command to paste, which has a line of its own where both do not fit stdout's."""
    width = columns(sys.stdout)
    return f"{text} {command}" if width is None or len(f"{text} {command}") <= width else f"{text}\n{command}"


def some(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first MAX_NAMES names, escaped, followed by the number of remaining names."""
    rest = len(names) - MAX_NAMES
    return separator.join(map(printable, names[:MAX_NAMES])) + (f" and {rest:,} more" if rest > 0 else "") or "none"


def say(text: str, file: TextIO | None = None) -> None:
    """Print to stdout, or to `file`, above any progress bar; see `wrapped`."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(wrapped(text, file or sys.stdout), file=file or sys.stdout)
            (file or sys.stdout).flush()


def load_torch() -> None:
    """Import PyTorch, and timm, which needs it, unless they are there; say so on stderr, because it takes seconds.

    PyTorch's threads will sleep soon while they wait for one another, unless one of WAITING says how they wait.
    """
    if "torch" in sys.modules:
        return
    # GNU's OpenMP, which PyTorch brings for Linux, reads this once, when it is loaded. By default, its threads spin for
    # milliseconds. Where other programs use the processors, they keep the thread that they wait for from running:
    # quickstart had 430 instead of 50 images/s beside two busy processes. Alone, this count costs nothing (1,395 and
    # 1,321 images/s), but fewer do: 750 with 100.
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "10000"
    say("loading PyTorch ...", sys.stderr)
    # Python's garbage collector would go through their million objects again and again while they are imported, and
    # once more at the end of the process: 5.0 instead of 3.1 seconds in all.
    was_on = gc.isenabled()
    gc.disable()
    # timm imports Weights & Biases where it is installed, for half a second and a function that nothing here calls.
    if is_hidden := "wandb" not in sys.modules:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        import timm  # noqa: F401
    finally:
        if is_hidden:
            del sys.modules["wandb"]
        gc.freeze()
        if was_on:
            gc.enable()


def warn(text: str) -> None:
    """Print a warning to stderr, above any progress bar."""
    say(f"WARNING: {text}", sys.stderr)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """Return tqdm's progress bar on stderr, as wide as the terminal, shown if there is one and removed at its end."""
    return tqdm(iterable, **{"disable": None, "dynamic_ncols": True, "leave": False} | options)


def duration(seconds: float) -> str:
    """Format a number of seconds as a duration, such as 1 h 02 min, 3 min 04 s or 5 s."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def fail(error: Exception) -> int:
    """Print an error to stderr in the format of all commands, with unprintable characters escaped.

    Returns an exit code: REFUSED or, if the error comes from a full or failing disk, FAILED.
    """
    path = Path(sys.argv[0])
    command = path.parent.name if path.stem == "__main__" else path.stem
    print(wrapped(printable_lines(f"{command}: {error}"), sys.stderr), file=sys.stderr)
    return FAILED if is_of_disk(error) else REFUSED
