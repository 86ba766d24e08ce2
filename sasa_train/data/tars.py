"""Read the headers of uncompressed tar archives that may be damaged, truncated or hostile.

Python's tarfile takes a damaged header for the end of the archive, which would silently lose the images behind it. It
also allocates whatever size an extended header claims and recurses into each. So only its parser of one header is used.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sasa_train.files import open_regular
from sasa_train.refusal import shorten
from sasa_train.terminal import printable

MAX_NAME = 512  # characters in a member's name; an index stores each name at the length of the longest
MAX_EXTENDED = 2**16  # bytes in an extended header, which holds a long name or, in pax archives, a few numbers as text
MAX_PADDING = 2**20  # zero bytes after the end mark; tar pads an archive to whole records of 10 KiB or, for tapes, more
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # the first bytes of gzip, bzip2, xz and zstd
LONG_NAME, IGNORED = tarfile.GNUTYPE_LONGNAME, (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=")


def open_tar(path: str | Path) -> tuple[BinaryIO, int]:
    """Return an open archive and its size in bytes; raise OSError if it is not a regular file."""
    file = open_regular(path)
    return file, os.fstat(file.fileno()).st_size


def members_of(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield all members of the archive between two offsets in `file`, to which each `offset_data` is relative.

    The data of regular files and of unknown types lies within the archive; no member is sparse.

    Raises:
        ValueError: a header is damaged, a member reaches beyond the end, or the archive does not end as it should.
    """
    offset, extended, is_extended = start, dict[str, Any](), False
    while member := _read_header(file, offset, end):
        member.offset_data = offset = offset + tarfile.BLOCKSIZE
        is_extended = member.type in (LONG_NAME, *PAX, *IGNORED)
        for attribute, value in () if is_extended else extended.items():
            setattr(member, attribute, value)
        _check(member, end)
        if is_extended:
            extended = _read_extended(file, member) | extended  # the first of several counts, as in tarfile
        else:
            extended = {}
            yield member
        if _has_data(member):
            offset += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if is_extended:
        raise ValueError("an extended header has no member after it")
    if end - offset > MAX_PADDING or _read(file, offset, end - offset).strip(b"\0"):
        raise ValueError(f"its end mark at byte {offset:,} is followed by more data")


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _read_header(file: BinaryIO, offset: int, end: int) -> tarfile.TarInfo | None:
    """Return the member whose header is at `offset`, or None at the end mark, which is a block of zeros."""
    if offset == 0 and _read(file, 0, 6).startswith(COMPRESSED):
        raise ValueError("it is compressed, and shards are read at any place in them: decompress it")
    block = _read(file, offset, tarfile.BLOCKSIZE) if offset + tarfile.BLOCKSIZE <= end else b""
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError("it ends without an end mark, so it is incomplete")
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(f"its header at byte {offset:,} is damaged: {error}") from error


def _has_data(member: tarfile.TarInfo) -> bool:
    return member.isreg() or member.type not in tarfile.SUPPORTED_TYPES or member.type in (LONG_NAME, *IGNORED)


def _check(member: tarfile.TarInfo, end: int) -> None:
    name = printable(shorten(member.name))
    if len(member.name) > MAX_NAME:
        raise ValueError(f"the name {name} must have at most {MAX_NAME} characters")
    if member.type == tarfile.GNUTYPE_SPARSE:
        raise ValueError(f"{name} is sparse, but must be stored whole")
    if _has_data(member) and not 0 <= member.size <= end - member.offset_data:
        raise ValueError(f"{name} must end within the archive, but its size is {member.size:,} bytes")


def _read_extended(file: BinaryIO, member: tarfile.TarInfo) -> dict[str, Any]:
    """Return the name and size that an extended header gives to the member after it."""
    if member.type in IGNORED:
        return {}
    if member.size > MAX_EXTENDED:
        raise ValueError(f"an extended header must have at most {MAX_EXTENDED:,} bytes, but one has {member.size:,}")
    data = _read(file, member.offset_data, member.size)
    if member.type == LONG_NAME:
        data += _read(file, member.offset_data + member.size, -member.size % tarfile.BLOCKSIZE)  # as tarfile does
        return {"name": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    records = _pax_records(data)
    found: dict[str, Any] = {}
    if any(key.startswith(b"GNU.sparse.") for key in records):
        raise ValueError("it has a sparse member, but its members must be stored whole")
    if b"path" in records:
        found["name"] = records[b"path"].decode("utf-8", "surrogateescape").rstrip("/")
    if b"size" in records:
        if not re.fullmatch(rb"[0-9]{1,19}", records[b"size"]):
            raise ValueError(f"a pax header has the size {shorten(records[b'size'])}")
        found["size"] = int(records[b"size"])
    return found


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Parse the records of a pax header, each of which is `LENGTH KEY=VALUE` and a line break."""
    records, position = {}, 0
    while position < len(data):
        match = PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("a pax header is damaged")
        records[match[2]] = data[match.end() : end - 1]
        position = end
    return records
