"""Byte ranges of files behind a URL, read by fsspec.

A request that fails or takes too long is repeated. A server that stays away ends the run with exit code 1, instead of
having its images counted as damaged, so that the same command goes on with the same images.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote

from sasa_train.extras import why_not
from sasa_train.refusal import ConfigError, ExpectedFailure, shorten
from sasa_train.terminal import printable

PAUSES = (0.5, 2.0, 8.0)  # seconds before each further try of a failed request
TIMEOUT, SILENCE = 60.0, 20.0  # seconds for a request over HTTP, and without a byte of its answer
PART = 2**24  # bytes of a request at most, except for an image
NOT_THERE = (403, 404, 410)  # 403: S3's answer to those who may not list
LATER = (408, 429)  # of the answers to wrong requests, those that a repetition may change

Result = TypeVar("Result")


class ServerError(ExpectedFailure):
    """Raised if a server fails or does not answer, also when asked again. Exit code 1."""


def is_url(text: Any) -> bool:
    return isinstance(text, str) and "://" in text


def joined(url: str, name: str) -> str:
    """Return the URL of a file in the folder `url`."""
    return f"{url.rstrip('/')}/{quote(name)}"


def check_protocol(url: str) -> None:
    """Raise ConfigError if fsspec cannot read such URLs here."""
    protocol = url.partition("://")[0]
    if reason := why_not(f"data.root={printable(url)}", "url"):
        raise ConfigError(reason)
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data.root={printable(url)}: {protocol} cannot be read ({shorten(error)})") from error


def size_of(url: str) -> int:
    """Return a file's size in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ServerError: the server fails.
        ConfigError: the server does not tell the size.
    """
    size = _ask(url, lambda files: files.info(url))["size"]
    if size is None:
        raise ConfigError(f"{printable(url)}: the server does not tell its size (Content-Length), which is needed")
    return size


def read_range(url: str, start: int, size: int) -> bytes:
    """Return `size` bytes of a file, from the byte `start` on.

    Raises:
        ServerError: the server fails, or sends fewer or more bytes.
    """

    def read(files: Any) -> bytes:
        content = files.cat_file(url, start, start + size) if size else b""
        if len(content) != size:
            raise ConnectionError(f"{len(content):,} bytes came in place of the {size:,} from byte {start:,} on")
        return content

    try:
        return _ask(url, read)
    except FileNotFoundError as error:
        raise ServerError(f"{printable(url)}: is not there any more; run the same command once it is back") from error


def read_file(url: str, most: int) -> bytes | None:
    """Return a file's content, or None if there is no such file; the errors of `size_of`, and of a larger one."""
    try:
        size = size_of(url)
    except FileNotFoundError:
        return None
    if size > most:
        raise ConfigError(f"{printable(url)}: has {size:,} bytes; {most:,} are the most")
    return b"".join(read_range(url, start, min(PART, size - start)) for start in range(0, size, PART))


def check_ranges(url: str) -> None:
    """Raise ConfigError if a server sends a whole file where a part is asked for; it is not read then."""

    def read(files: Any) -> bytes:
        with files.open(url, "rb", cache_type="none") as file:
            try:
                file.seek(1)
                return file.read(1)
            except ValueError as error:
                raise ConfigError(
                    f"{printable(url)}: the server does not send parts of a file (HTTP ranges), which are needed; use "
                    "another server, or copy the shards to a disk"
                ) from error

    _ask(url, read)


def _ask(url: str, ask: Callable[[Any], Result]) -> Result:
    """Return `ask(filesystem)`, called again after pauses if it fails."""
    for pause in (*PAUSES, None):
        try:
            return ask(_files(url.partition("://")[0], os.getpid()))
        except (MemoryError, ConfigError):
            raise
        except Exception as raised:  # of aiohttp, botocore and others, which have no common base class
            # fsspec calls a server's failure FileNotFoundError, too.
            error = raised.__cause__ or raised if isinstance(raised, FileNotFoundError) else raised
            status = getattr(error, "status", 0)
            if status in NOT_THERE or isinstance(error, FileNotFoundError):
                raise FileNotFoundError(url) from error
            if pause is None or (400 <= status < 500 and status not in LATER):
                reason = printable(shorten(error)) or f"no answer within {TIMEOUT:g} seconds"
                raise ServerError(
                    f"{printable(url)}: the server failed {len(PAUSES) + 1 if pause is None else 1} times "
                    f"({type(error).__name__}: {reason}); run the same command again once it answers"
                ) from error
            time.sleep(pause)
    raise AssertionError


@cache
def _files(protocol: str, _process: int) -> Any:
    # Each process has its own, because neither connections nor the thread that serves them survive a fork. fsspec's
    # cache would close the parent's connections in the child, which takes a second.
    import fsspec

    if protocol not in ("http", "https"):
        return fsspec.filesystem(protocol)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=TIMEOUT, sock_connect=SILENCE, sock_read=SILENCE)
    # trust_env: proxies from the environment, and credentials from ~/.netrc
    client, headers = {"timeout": timeout, "trust_env": True}, {"Accept-Encoding": "identity"}
    return fsspec.filesystem(protocol, client_kwargs=client, headers=headers, skip_instance_cache=True)
