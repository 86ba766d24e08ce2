"""Atomic file writes that survive crashes of the process or machine, and locks that allow one writer per folder."""

import csv
import difflib
import errno
import fcntl
import glob
import io
import json
import os
import platform
import re
import shlex
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from sasa_train.machine import now
from sasa_train.refusal import DISK_FAILED, ConfigError


def write_atomic(path: Path, data: bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """Write bytes or a function's output to a file; after any crash, it holds either the old or the new content."""
    temporary = write_aside(path, data if callable(data) else lambda file: file.write(data))
    try:
        os.replace(temporary, path)
    except BaseException:  # for example, because a folder has this name
        discard(temporary)
        raise
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the path to an OSError without one, as errors in reading, writing and syncing an open file have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def discard(path: Path) -> None:
    """Delete a file that is no longer needed, if the disk allows it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Call `write` to write a temporary file beside `path`, and return its path; delete the file if writing fails."""
    # The name is random, because several runs may write the same index at once. Opening fails if the file exists, so
    # that nothing is written through a link.
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with naming(path), temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        discard(temporary)
        raise
    return temporary


def unfinished(folder: Path) -> list[Path]:
    """Return the files that `write_aside` began in a folder; no other file has such a name."""
    return [path for path in folder.glob("*.tmp") if re.fullmatch(r".+\.[0-9a-f]{8}\.tmp", path.name)]


def is_there(path: Path, is_kind: Callable[[int], bool] = bool) -> bool:
    """Return whether a path exists and is of a kind, such as `stat.S_ISREG`; raise OSError if the disk fails.

    `os.path.exists` and its like would answer False then and, since Python 3.14, those of Path, too.
    """
    try:
        return is_kind(os.stat(path).st_mode)
    except ValueError:  # a name with NUL
        return False
    except OSError as error:
        if error.errno in DISK_FAILED:
            raise
        return False


def did_you_mean(path: str | Path) -> str:
    """Return ' (did you mean ...?)' with a path that is there and differs from `path` in one similar name, else ''.

    Of a pattern, that is the folder before it.
    """
    path = Path(path)
    if glob.has_magic(str(path)):
        folder = next((place for place in path.parents if not glob.has_magic(str(place))), path)
        is_folder = folder.is_dir() and folder != Path()
        return f" (a folder is wanted, not a pattern{f': {shlex.quote(str(folder))}' * is_folder})"
    for place in (path, *path.parents):
        if place.parent.is_dir() and not place.exists():
            with suppress(OSError):
                for name in difflib.get_close_matches(place.name, os.listdir(place.parent), cutoff=0.75):
                    if (similar := place.parent / name / path.relative_to(place)).exists():
                        return f" (did you mean {shlex.quote(str(similar))}?)"
    return ""


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a file for reading; raise OSError at once if it is a pipe or device, which could block forever."""
    return open(path, "rb", opener=_regular)


MAX_BYTES = 64 * 2**20  # a file of a run, which is read as a whole; a sparse one takes no room on the disk


def read_regular(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file that `open_regular` can open; raise OSError if it is larger than `max_bytes`."""
    with naming(path), open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise OSError(errno.ENOTSUP, f"is larger than {max_bytes / 2**20:,.0f} MiB", str(path))
        return file.read()


def _regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.ENOTSUP, "is not a regular file", path)
    return descriptor


# A spreadsheet would execute a text as a formula if it begins like this, unless it is a number.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FORMULA = re.compile(r"'*[=+@\t\r\n\uff1d\uff0b\uff20\uff0d-]")
# In many countries, cells end at semicolons; some programs end them at tabs. There, our quotes in the middle of a cell
# do not count, and a new cell begins inside the text.
INNER_FORMULA = re.compile(r"([;\t\r\n])(?=[\"']*[=+@\uff1d\uff0b\uff20\uff0d-])")


def csv_text(rows: Iterable[Iterable[Any]], quoting: Any = csv.QUOTE_MINIMAL) -> str:
    """Return records, optionally starting with a header, as CSV with Unix line endings.

    An apostrophe is put before all that a spreadsheet would execute as a formula: at the start of a text that is no
    number, and after a semicolon, tab or line break in it. Numbers are not changed.
    """
    line, lines = io.StringIO(), []
    # The writer quotes texts with a character of `ending`: where another program might end the cell, and, as such a
    # program may join a text to the number before it, what runs programs or functions in a formula.
    ending = "\r\n;\t(|"
    writer = csv.writer(line, quoting=quoting, lineterminator=ending)
    for row in rows:
        writer.writerow([_without_formulas(cell) if isinstance(cell, str) else cell for cell in row])
        lines.append(line.getvalue().removesuffix(ending) + "\n")
        line.seek(0)
        line.truncate()
    return "".join(lines)


def _without_formulas(text: str) -> str:
    # Apostrophes that precede a formula are part of the patterns, so that removing one of each restores every text.
    if FORMULA.match(text) and not NUMBER.fullmatch(text):
        text = f"'{text}"
    return INNER_FORMULA.sub(r"\1'", text)


def inside(folder: Path, *parts: str) -> Path:
    """Return the path `folder/part/...` of an output folder, which need not exist yet.

    Raises:
        ConfigError: it or a folder on the way, beginning with `folder`, is a symbolic link or is not a folder. A run
            or sweep folder may come from anyone, and nothing in it may lead writes elsewhere.
    """
    path = folder
    for part in ("", *parts):
        path = path / part
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a symbolic link, and a command writes inside the folder that it is given alone: put there "
                "what it links to, or give that folder"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is {kind(path)}, where a folder must be; move it away")
    return path


def kind(path: Path) -> str:
    """Return what is at a path: "a file", "a folder", "a symbolic link", "a pipe", "a socket" or "a device"."""
    mode = os.lstat(path).st_mode
    tests = {
        "a file": stat.S_ISREG, "a folder": stat.S_ISDIR, "a symbolic link": stat.S_ISLNK, "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }  # fmt: skip
    return next((name for name, is_it in tests.items() if is_it(mode)), "a device")


def open_own(path: Path, flags: int) -> int:
    """Open or create a file for writing in place, and return its descriptor.

    Raises:
        ConfigError: it is a link, also a hard link, so that another file would be changed; or it is not a file.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ConfigError(f"{path}: is {kind(path)}, where a file must be; move it away") from error
        raise
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = "a hard link to another file" if stat.S_ISREG(found.st_mode) else kind(path)
    raise ConfigError(f"{path}: is {what}, where a file must be; move it away")


def write_outputs(folder: Path, files: Mapping[str, bytes], option: str = "--out") -> None:
    """Write files atomically to a folder, which is created if necessary.

    Raises:
        ConfigError: a file cannot be written; the message names the `option` that selects another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{folder}: cannot be written ({reason}); give another place with {option}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, so that they survive a power failure."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(directory)


LOCK = ".lock"
MAX_LOCK = 4096  # characters of it that are read


@dataclass
class FolderLock:
    """A lock on a folder, held until it is closed: its lock file, the file's name and a descriptor of the folder."""

    file: IO[str]
    name: str
    folder: int
    text: str  # what the lock file says: who holds it
    identity: tuple[int, int]  # the lock file's device and inode

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.file.closed:
            self.file.close()
            os.close(self.folder)
            _held.discard(self.identity)

    def holds(self, path: Path) -> bool:
        """Return whether the folder at `path`, and the lock file in it, are still those that were locked.

        The lock is taken again, because a process loses it when it closes the lock file anywhere, as a hook that copies
        the folder does. Another process may have it since then or, as the file then says, may have had it.

        Raises:
            OSError: the disk or file server failed, so that this cannot be told.
        """
        # A folder's inode is compared, too, because a lock file can be linked or moved to another folder. While the
        # folder is open, no other can get its inode.
        try:
            if not (_is(os.stat(path), self.folder) and _is(os.lstat(path / self.name), self.file.fileno())):
                return False
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.pread(self.file.fileno(), len(self.text) + 1, 0) == self.text.encode()
        except OSError as error:
            if error.errno in (*DISK_FAILED, errno.ENOLCK):
                raise
            return False


def _is(found: os.stat_result, descriptor: int) -> bool:
    held = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


_held: set[tuple[int, int]] = set()  # the devices and inodes of the lock files that this process holds
_locking = threading.Lock()


def lock_folder(path: Path, name: str = LOCK, other: str = "another run_name") -> FolderLock:
    """Lock a folder until the returned lock is closed; error messages suggest `other` as an alternative.

    Raises:
        ConfigError: another process, or another thread of this one, holds the lock, or the disk does not support locks.
    """
    with _locking:
        return _lock_folder(path, name, other)


def _lock_folder(path: Path, name: str, other: str) -> FolderLock:
    # A POSIX record lock instead of flock, because data workers, which may outlive a killed run by seconds, do not
    # inherit it. The operating system releases it when the process ends, for whatever reason.
    with ExitStack() as opened:
        try:
            # To open it again, and close it, would release the lock that this process holds.
            if _identity(path / name) in _held:
                raise ConfigError(f"{path} is in use by this very process; wait for it, or use {other}")
            folder = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)  # O_PATH is Linux's
            opened.callback(os.close, folder)
            file = opened.enter_context(_open(path / name))
        except OSError as error:
            if error.errno in DISK_FAILED:
                raise
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): use a folder that can be written"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"{path} is in use by {_described(file)}; wait for it, or use {other}") from None
        except OSError as error:
            text = f"{path} cannot be locked ({error.strerror}): use an output_dir on a disk that can"
            raise ConfigError(text) from None
        found = os.fstat(file.fileno())
        text = json.dumps({"host": platform.node(), "process": os.getpid(), "started": now()})
        file.truncate(0)
        file.write(text)
        file.flush()
        opened.pop_all()
    identity = found.st_dev, found.st_ino
    _held.add(identity)
    return FolderLock(file, name, folder, text, identity)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def holder(path: Path, name: str = LOCK) -> str | None:
    """Describe the process that holds the folder's lock, or return None if it is not locked."""
    if (identity := _identity(path / name)) is None:
        return None
    if identity in _held:  # to open the file, and close it, would release the lock
        return "this process"
    try:
        opened = _open(path / name)
    except (OSError, ConfigError):  # the run that starts there says what is wrong with it
        return None
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return _described(file)
        return None


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Create a folder if necessary and lock it; errors refer to it by `name`, which includes the option that set it."""
    # Two commands in one folder would delete each other's unfinished files. flock needs no lock file, which would
    # remain in a folder that users share.
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
    return os.fdopen(open_own(path, os.O_RDWR), "r+")


def _described(file: IO[str]) -> str:
    try:
        holder = json.loads(file.read(MAX_LOCK))
        return f"process {holder['process']} on {holder['host']}, which started at {holder['started']}"
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # it has just taken the lock and has not written its details yet
        return "another run"
