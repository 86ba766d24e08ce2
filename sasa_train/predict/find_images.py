"""Image files given by command-line arguments, which are files, folders, patterns, or `-` for a list on stdin.

Only the names in one folder, or the matches of one pattern, are in memory at a time.
"""

import glob
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sasa_train.files import did_you_mean
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

if TYPE_CHECKING:
    from sasa_train.data.listing import LeftOut

LISTED = "-"  # the argument for a list on stdin
RECURSIVE = "**"  # in a pattern: any number of folders
SEPARATOR, NUL = b"\n", b"\0"
MAX_NAME = 2**16  # maximum bytes of a listed name, ten times as many as any system allows


class Found(NamedTuple):
    """A file to read as an image, or an argument that yields no file, with the reason in `fault`."""

    path: str
    fault: str = ""


def find_images(
    words: Sequence[str], separator: bytes = SEPARATOR, left_out: "LeftOut | None" = None
) -> Iterator[Found]:
    """Find all files named in `words`, and, in folders, all images that are not hidden.

    words: files; folders, searched recursively in name order; quoted patterns (*, ?, [], **), expanded in sorted order;
        `-` for files and folders read from stdin, each followed by `separator`.
    left_out: if given, the files and folders that are not read are noted in it.

    Raises:
        ConfigError: stdin does not contain a list of names.
    """
    from sasa_train.data.listing import LeftOut

    left_out = left_out or LeftOut()
    for word in words:
        if word == LISTED:
            for path in _listed(separator):
                yield from _at(path, left_out)
        elif glob.has_magic(word) and not os.path.lexists(word):
            yield from _matching(word, left_out)
        else:
            yield from _at(word, left_out)


def _at(path: str, left_out: "LeftOut") -> Iterator[Found]:
    if not os.path.lexists(path):
        yield Found(path, f"is not there{did_you_mean(path)}")
    elif os.path.isdir(path):
        yield from _within(path, left_out)
    else:
        yield Found(path)


def _matching(pattern: str, left_out: "LeftOut") -> Iterator[Found]:
    """Yield a pattern's matches as if each were an argument; for **, skip folders, because their files match too."""
    matches = sorted(set(_expanded(os.path.expanduser(pattern), left_out)))
    if RECURSIVE in pattern.split(os.sep):
        matches = [path for path in matches if not os.path.isdir(path)]
    if not matches:
        yield Found(pattern, "is not there, and as a pattern it matches nothing")
    for path in matches:
        yield from _at(path, left_out)


def _expanded(pattern: str, left_out: "LeftOut") -> list[str]:
    """Expand a pattern; unlike glob, let ** read each folder once, because links in a circle would take it forever."""
    parts = pattern.split(os.sep)
    if RECURSIVE not in parts:
        return glob.glob(pattern)
    at = parts.index(RECURSIVE)
    head, rest = os.sep.join(parts[:at]) or os.sep * at, os.path.join(*parts[at + 1 :], *["*"] * (at + 1 == len(parts)))
    tops = [path for path in glob.glob(head) if os.path.isdir(path)] if head else [""]
    folders = (folder for top in tops for folder, _, _ in _folders(top or os.curdir, left_out))
    named = (folder if head else os.path.relpath(folder) for folder in folders)
    inner = (os.path.join(glob.escape(folder), rest) if folder != os.curdir else rest for folder in named)
    return [path for pattern in inner for path in _expanded(pattern, left_out)]


def _within(top: str, left_out: "LeftOut") -> Iterator[Found]:
    found = _walk(top, left_out)
    first = next(found, Found(top, "holds no image"))
    yield from itertools.chain([first], found)


def _walk(top: str, left_out: "LeftOut") -> Iterator[Found]:
    """Yield the images in a folder, then those in its subfolders."""
    from sasa_train.data.listing import images_among

    for folder, names, fault in _folders(top, left_out):
        yield from [Found(folder, fault)] if fault else map(Found, images_among(folder, names, left_out))


def _folders(top: str, left_out: "LeftOut") -> Iterator[tuple[str, list[str], str]]:
    """Yield `top` and the folders in it, each with its files or the reason why it cannot be listed.

    Links are followed last, so that they yield to the folders themselves; each folder is read once. Hidden folders are
    not read.
    """
    from sasa_train.data.listing import identity_of, is_hidden_name

    folders, links, seen = [top], list[str](), set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            if (identity := identity_of(folder)) in seen:
                left_out.repeated.append(folder)
                continue
            seen.add(identity)
            names, inner = _listing(folder)
        except OSError as error:
            yield folder, [], error.strerror or str(error)
            continue
        yield folder, names, ""
        left_out.hidden += (os.path.join(folder, name) for name in inner if is_hidden_name(name))
        shown = [os.path.join(folder, name) for name in inner if not is_hidden_name(name)]
        links += filter(os.path.islink, shown)
        folders += [path for path in reversed(shown) if not os.path.islink(path)]


def _listing(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of a folder's files and the sorted names of its subfolders."""
    names, inner = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            # Links are handled separately, because entry.is_dir() raises an error for circular links.
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                inner.append(entry.name)
            else:
                names.append(entry.name)
    return names, sorted(inner)


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
