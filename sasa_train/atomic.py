"""Files that appear whole or not at all, whenever the process or the machine dies."""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a crash at any instruction leaves the old content or the new one."""
    os.replace(write_aside(path, data), path)
    sync_folder(path.parent)


def write_aside(path: Path, data: bytes | memoryview) -> Path:
    """Write `data` to disk beside `path`, ready to be renamed to it; nothing is left behind where that fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several runs may make one index
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
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
