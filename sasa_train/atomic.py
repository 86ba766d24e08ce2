"""Files that appear whole or not at all, whenever the process or the machine dies."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a crash at any instruction leaves the old content or the new one."""
    os.replace(write_aside(path, lambda file: file.write(data)), path)
    sync_folder(path.parent)


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a file on disk beside `path`, ready to be renamed to it; nothing is left where that fails."""
    # A name of its own, as several runs may make one index; a new file, so that no link leads elsewhere.
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
