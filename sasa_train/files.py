"""Files that appear whole or not at all, whenever the process or the machine dies; and one writer per folder."""

import csv
import fcntl
import io
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from sasa_train.machine import now
from sasa_train.refusal import ConfigError


def write_atomic(path: Path, data: bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """Write `data`, or what it writes, so that a crash at any instruction leaves the old content or the new one."""
    os.replace(write_aside(path, data if callable(data) else lambda file: file.write(data)), path)
    sync_folder(path.parent)


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a file on disk beside `path`, ready to be renamed to it; leave nothing where that fails."""
    # A random name, as several runs may write one index at once; a new file, so that no link leads elsewhere.
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


def csv_text(rows: Iterable[Iterable[Any]], quoting: Any = csv.QUOTE_MINIMAL) -> str:
    """Return records, the first of which may be the columns' names, as CSV with Unix's line ends."""
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_outputs(folder: Path, files: Mapping[str, bytes], option: str = "--out") -> None:
    """Write files, each whole or not at all, into a folder that is made where it is missing.

    Raises:
        ConfigError: they cannot be written; it names the `option` for another place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{folder}: cannot be written ({reason}); give another place with {option}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


LOCK = ".lock"


def lock_folder(path: Path, name: str = LOCK, other: str = "another run_name") -> IO[str]:
    """Take the folder's lock, which is ours while the file stays open; `other` is what an error advises instead.

    Raises:
        ConfigError: another process has it, or the folder's disk has no locks.
    """
    # POSIX's record lock, not flock: data workers, which may outlive a killed run by seconds, do not inherit it. The
    # operating system drops it when its process ends, however it ends.
    file = _open(path / name)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            if isinstance(error, BlockingIOError | PermissionError):
                text = f"{path} is in use by {_described(file)}; wait for it, or use {other}"
            else:
                text = f"{path} cannot be locked ({error.strerror}): use an output_dir on a disk that can"
        raise ConfigError(text) from None
    file.truncate(0)
    json.dump({"host": platform.node(), "process": os.getpid(), "started": now()}, file)
    file.flush()
    return file


def holder(path: Path) -> str | None:
    """Tell who holds the folder's lock; None where nobody does."""
    # Not for our own lock, which closing the file would drop.
    if not (path / LOCK).exists():
        return None
    with _open(path / LOCK) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return _described(file)
        return None


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Make the folder, where it is missing, and lock it; `name` is what errors call it, with the option it came by."""
    # Two commands in one folder would delete each other's unfinished files. flock needs no lock file, which would be
    # left in a folder that people pass on.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{name} cannot be made ({error.strerror}); give another folder") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{name} is being written by another command; wait for it") from None
        except OSError as error:
            raise ConfigError(
                f"{name} cannot be locked ({error.strerror}): give a folder on a disk that can"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> IO[str]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")


def _described(file: IO[str]) -> str:
    try:
        holder = json.load(file)
        return f"process {holder['process']} on {holder['host']}, which started at {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it has taken the lock this moment, and not written yet
        return "another run"
