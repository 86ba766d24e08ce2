"""Run a command in a pseudo-terminal, and read what its screen shows."""

import errno
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path


def lines_in_terminal(folder: Path, num_columns: int, *arguments: str) -> list[str]:
    """Run `python -m sasa_train ...` in a terminal of this width; return all states of its lines, without controls."""
    process, terminal = pty.fork()
    if process == 0:
        # The width must be set before Python starts, because it may be read at once.
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, num_columns, 0, 0))
        os.chdir(folder)
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        os.execve(
            sys.executable, [sys.executable, "-m", "sasa_train", *arguments], environment | {"OMP_NUM_THREADS": "1"}
        )
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError as error:  # Linux reports the end of the program as EIO
        assert error.errno == errno.EIO
    finally:
        os.close(terminal)
    _, status = os.waitpid(process, 0)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown.decode())
    assert os.waitstatus_to_exitcode(status) == 0, text
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
