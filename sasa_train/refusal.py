"""Exceptions for invalid configs and inputs, and what libraries raise for invalid values and the system for disks."""

import errno
from collections.abc import Iterator
from typing import Any


class ConfigError(Exception):
    """Raised for an invalid config or input; the message names the key, value, rule and remedy. Exit code 2."""


class CheckpointError(Exception):
    """Raised if a checkpoint cannot be written or read; the message names the file and a remedy."""


class ExpectedFailure(Exception):
    """Raised for a foreseeable failure after the input was accepted; the message says what to do. Exit code 1."""


# timm, torch and others raise these for invalid values, in some cases only when the values are used.
LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Errors of the disk, or of a file server and the way to it, which may be over later: the file may be whole. Not every
# system has all of them.
DISK_FAILED = {
    getattr(errno, name, errno.EIO)
    for name in (
        "EIO", "ESTALE", "ENXIO", "ENODEV", "ENOTCONN", "ETIMEDOUT", "EREMOTEIO", "EUCLEAN", "EBADMSG", "EHOSTDOWN",
        "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNRESET", "ECONNREFUSED", "ENOLINK",
        "ECOMM", "EPROTO", "ESHUTDOWN",
    )
}  # fmt: skip


def causes(error: BaseException, with_context: bool = True) -> Iterator[BaseException]:
    """Yield an error and those from which or, `with_context`, during whose handling it was raised."""
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and all(link is not each for each in seen):  # OmegaConf chains some in a cycle
        yield link
        seen.append(link)
        link = link.__cause__ or (link.__context__ if with_context else None)


def is_of_disk(error: BaseException) -> bool:
    """Return whether an error is, or was raised from, one of a full or failing disk; the input may be right then."""
    # A socket or pipe in place of a file gives ENXIO, too.
    numbers = {*DISK_FAILED, errno.ENOSPC, errno.EDQUOT} - {errno.ENXIO}
    found = causes(error, with_context=False)
    return any(isinstance(cause, OSError) and cause.errno in numbers for cause in found)


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={shorten(value)} {rule}")


def shorten(value: Any) -> str:
    """Convert a value to a string for use in a message, and truncate it if it is long."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"
