"""Image files given by command-line arguments, which are files, folders, patterns, or `-` for a list on stdin.

Only the names in one folder, or the matches of one pattern, are in memory at a time.
"""

import errno
import glob
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

LISTED = "-"  # the argument for a list on stdin
SEPARATOR, NUL = b"\n", b"\0"
MAX_NAME = 2**16  # maximum bytes of a listed name, ten times as many as any system allows


class Found(NamedTuple):
    """A file to read as an image, or an argument that yields no file, with the reason in `fault`."""

    path: str
    fault: str = ""


def find_images(words: Sequence[str], separator: bytes = SEPARATOR) -> Iterator[Found]:
    """Find all files named in `words`, whatever their extension, and, in folders, all files with an image extension.

    words: files; folders, searched recursively in name order; quoted patterns (*, ?, [], **), expanded in sorted order;
        `-` for files and folders read from stdin, each followed by `separator`.

    Raises:
        ConfigError: stdin does not contain a list of names.
    """
    for word in words:
        if word == LISTED:
            for path in _listed(separator):
                yield from _at(path)
        elif glob.has_magic(word) and not os.path.lexists(word):
            yield from _matching(word)
        else:
            yield from _at(word)


@cache
def image_extensions() -> tuple[str, ...]:
    """Return the lower-case extensions of all formats that data sets may use: .jpg, .png, ..."""
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from sasa_train.data.datasets import FORMATS

    known = Image.registered_extensions().items()
    return tuple(sorted({*IMG_EXTENSIONS, *(ending for ending, kind in known if kind in FORMATS)}))


def _at(path: str) -> Iterator[Found]:
    if not os.path.lexists(path):
        yield Found(path, "is not there")
    elif os.path.isdir(path):
        yield from _within(path)
    else:
        yield Found(path)


def _matching(pattern: str) -> Iterator[Found]:
    """Yield a pattern's matches as if each were an argument; for **, skip folders, because their files match too."""
    matches = sorted(glob.iglob(os.path.expanduser(pattern), recursive=True))
    if "**" in pattern:
        comes_round = cache(_comes_round)
        matches = [path for path in matches if not os.path.isdir(path) and not comes_round(os.path.dirname(path))]
    if not matches:
        yield Found(pattern, "is not there, and as a pattern it matches nothing")
    for path in matches:
        yield from _at(path)


def _comes_round(folder: str) -> bool:
    """Whether a link in the path `folder` leads back to one of its parents; ** would follow such a link 40 times."""
    way = [folder, *map(str, Path(folder).parents)]
    return any(
        os.path.islink(step) and any(os.path.samefile(step, earlier) for earlier in way[number + 1 :])
        for number, step in enumerate(way)
    )


def _within(top: str) -> Iterator[Found]:
    found = _walk(top)
    first = next(found, Found(top, f"holds no file that ends in {', '.join(image_extensions())}"))
    yield from itertools.chain([first], found)


def _walk(top: str) -> Iterator[Found]:
    """Yield the images in a folder, then those in its subfolders; links are followed unless they lead to a parent."""
    folders: list[tuple[str, frozenset]] = [(top, frozenset())]  # with the identities of the parent folders
    while folders:
        folder, above = folders.pop()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise OSError(errno.ELOOP, "is a link to a folder that it lies in, and is not followed")
            names, inner = _listing(folder)
        except OSError as error:
            yield Found(folder, error.strerror or str(error))
            continue
        yield from (Found(os.path.join(folder, name)) for name in names)
        folders += [(os.path.join(folder, name), above | {identity}) for name in reversed(inner)]


def _listing(folder: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of a folder's images and of its subfolders."""
    names, inner = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            # Links are handled separately, because entry.is_dir() raises an error for circular links.
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                inner.append(entry.name)
            elif entry.name.lower().endswith(image_extensions()):
                names.append(entry.name)
    return sorted(names), sorted(inner)


def _listed(separator: bytes) -> Iterator[str]:
    """Yield the names from stdin as they arrive, skipping empty ones."""
    rest, is_open = b"", True
    while is_open:
        chunk = os.read(sys.stdin.fileno(), MAX_NAME)
        is_open = bool(chunk)
        *names, rest = (rest + chunk).split(separator)
        for name in names if is_open else [*names, rest]:
            if separator != NUL:
                _check_text(name)
                name = name.removesuffix(b"\r")
            if name:
                yield os.fsdecode(name)
        if len(rest) > MAX_NAME:
            raise ConfigError(f"stdin: not a list of file names, one has more than {MAX_NAME:,} bytes")


def _check_text(name: bytes) -> None:
    if NUL in name:
        raise ConfigError(
            f"stdin: not a list of file names, one per line: '{printable(os.fsdecode(name[:20]))}' has a NUL byte. "
            "Where NUL separates the names (find -print0), add --null; an image itself is given as a file"
        )
