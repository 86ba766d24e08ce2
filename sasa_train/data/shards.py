"""Tar shards in the webdataset layout, read in place with one open file per shard instead of one per image.

A sample is an image `KEY.jpg` and its label `KEY.cls`. An index of offsets, kept beside the shards, lets a single
`pread` fetch any image, so ordering, workers and resuming work as they do for class folders. Images are ordered by
label and key, so shards that sasa-data creates from class folders yield the same images in the same order.
"""

import errno
import io
import os
import re
import resource
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from tarfile import TarInfo
from typing import BinaryIO

import numpy as np

from sasa_train.data import urls
from sasa_train.data.listing import OTHER_FORMATS, LeftOut, folders_with_images, image_extensions, is_hidden, is_image
from sasa_train.data.shard_index import COLUMNS, LEFT_OUT, MAX_CLASSES, index_bytes, parse_index, read_index
from sasa_train.data.tars import members_of, open_tar
from sasa_train.files import open_regular, write_atomic
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable, progress_bar, say, some, warn

MAX_IMAGE_BYTES = 2**30  # an uncompressed image with as many pixels as are allowed, 89 million of 8 bytes, has fewer
MAX_HEADER_BYTES = 2**20  # by which a member of another name is identified
MAX_LABEL_BYTES = 20  # a number, and perhaps a line break
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
ARCHIVE = re.compile(r"\.(tar(\.\w+)?|t[bgx]z2?|zip|7z|rar)$", re.IGNORECASE)
NUM_READERS = 8  # threads that ask for the sizes of shards behind a URL
MAX_INDEX_BYTES = 2**31  # of shards behind a URL
LISTING = "listing 2"  # changes when other members are taken as images, so that older indexes are built anew


@dataclass
class TarMembers:
    """Files in uncompressed tar archives, each given by its archive, its offset and size in bytes, and its name.

    `archives` are paths or URLs.
    """

    archives: list[str]
    archive: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: np.ndarray
    # Inode, size and time of each archive, so that one that replaces it is not read from the old file.
    versions: list[tuple[int, int, int]] | None = None

    def open(self, position: int) -> BinaryIO:
        """Read the member's bytes into memory; if the archive is truncated, fewer than `size` bytes are read.

        Raises:
            ServerError: the archive is behind a URL, and the server fails.
            OSError: the archive cannot be read, or the member has more than MAX_IMAGE_BYTES.
        """
        check_image_size(int(self.size[position]), self.name(position))
        archive = self.archive[position]
        if urls.is_url(path := self.archives[archive]):
            return io.BytesIO(urls.read_range(path, int(self.offset[position]), int(self.size[position])))
        with _opening:
            file = _opened(path, self.versions[archive] if self.versions else None)
        return io.BytesIO(os.pread(file.fileno(), int(self.size[position]), int(self.offset[position])))

    def name(self, position: int) -> str:
        return f"{self.archives[self.archive[position]]}:{self.names[position]}"


def check_image_size(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise OSError(errno.EFBIG, f"{num_bytes:,} bytes exceed the limit of {MAX_IMAGE_BYTES:,}", name)


_opening = threading.Lock()


@cache
def _opened(path: str, _version: tuple[int, int, int] | None) -> BinaryIO:
    # All readers can share one open file, because pread does not use the file position. ImageNet may have more shards
    # than the default limit on open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open_regular(path)


def find_shards(root: Path, split: str) -> list[Path]:
    """Find `root/train/*.tar` or `root/*train*.tar`; val may also be named validation.

    Raises:
        ConfigError: the split's folder holds shards and class folders.
    """
    folders = [root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()]
    for folder in folders:
        if found := _tars(folder):
            _refuse_class_folders(found, folders)
            return found
    for name in SPLIT_NAMES[split] if not folders else ():  # ImageNet's archives may be beside class folders
        if found := _tars_named(root, name):
            return found
    return []


def _tars_named(folder: Path, name: str) -> list[Path]:
    word = re.compile(rf"(^|[^a-z]){name}([^a-z]|$)")  # so that interval-train does not match val
    return [path for path in _tars(folder) if word.search(path.stem.lower())]


def _refuse_class_folders(shards: Sequence[Path], folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            names = folders_with_images(folder)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be listed ({error.strerror})") from error
        if names:
            raise ConfigError(
                f"{printable(folder)}: holds class folders with images ({some(names)}), but {printable(shards[0])} is "
                "a shard of the same split; move the shards or the class folders elsewhere"
            )


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def load_shards(shards: Sequence[Path], split: str, left_out: LeftOut | None = None) -> tuple[TarMembers, np.ndarray]:
    """Return the images in a split's shards and their int64 labels, ordered by (label, key).

    The index is read from `SPLIT.index.npz` beside the shards, or built and saved there if the folder is writable. It
    is built again if the shards' sizes or modification times are others, or a shard has changed since; a damaged index
    is also reported.

    left_out: if given, the shards are read even if there is an index, and members that are not data are noted in it.

    Raises:
        ConfigError: a shard is not a complete tar file, an image has no valid label, or there are no images.
    """
    index = shards[0].with_name(f"{split}.index.npz")
    stats = [_stat(path) for path in shards]
    identity = np.array([f"{LISTING} {p.name} {s.st_size} {s.st_mtime_ns}" for p, s in zip(shards, stats, strict=True)])
    table = None
    try:
        table = read_index(index, identity, np.array([s.st_size for s in stats]))
        if _is_older(index, stats):
            table = None
    except FileNotFoundError:
        pass
    except Exception as error:  # zipfile and numpy have no common base class: BadZipFile, SyntaxError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        warn(printable(f"{index} is not used ({shorten(reason)}); the shards are scanned again"))
    if table is None or left_out is not None:
        table = _scan(shards, noted := LeftOut())
        table[LEFT_OUT] = np.array([noted.describe()])
        if left_out is not None:
            left_out.add(noted)
        try:
            write_atomic(index, index_bytes(identity, table))
        except OSError as error:
            print(f"{index}: cannot be written ({error.strerror}); the shards will be scanned at every start")
    beside = _beside(shards)
    if left_out is not None:
        left_out.beside += beside
    elif told := "; ".join(filter(None, [table[LEFT_OUT][0], LeftOut(beside=beside).describe()])):
        say(f"{printable(shards[0].parent)}: left out, {printable(told)}", sys.stderr)
    labels = table.pop("labels")
    del table[LEFT_OUT]
    versions = [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
    return TarMembers([str(p) for p in shards], **table, versions=versions), labels


def _beside(shards: Sequence[Path]) -> list[str]:
    """Return the archives, images and folders of tar files beside shards, without the shards of other splits."""
    folder = shards[0].parent
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be listed ({error.strerror})") from error
    split_names, images = [*chain(*SPLIT_NAMES.values())], tuple(image_extensions())
    of_splits = {path.name for path in chain(shards, *(_tars_named(folder, name) for name in split_names))}

    def may_be_meant(name: str) -> bool:
        path = folder / name
        if path.is_dir():
            return name not in split_names and bool(_tars(path))
        return ARCHIVE.search(name) is not None or name.lower().endswith(images)

    return [name for name in names if name not in of_splits and not is_hidden(name) and may_be_meant(name)]


def _is_older(index: Path, shards: Sequence[os.stat_result]) -> bool:
    """Return whether a shard came to its place after the index, even one of an old modification time, as copies have.

    Nobody can choose a file's time of change (ctime), which the kernel sets.
    """
    return index.stat().st_ctime_ns < max(shard.st_ctime_ns for shard in shards)


def find_index(root: str, split: str) -> str | None:
    """Return the URL of a split's index, which is in the split's folder or in `root`; None if there is none.

    Raises:
        ServerError: the server fails.
    """
    urls.check_protocol(root)
    for folder in (*(urls.joined(root, name) for name in SPLIT_NAMES[split]), root):
        try:
            urls.size_of(index := urls.joined(folder, f"{split}.index.npz"))
        except FileNotFoundError:
            continue
        return index
    return None


def load_url_shards(root: str, split: str) -> tuple[TarMembers, np.ndarray]:
    """Return the images in a split's shards behind a URL and their labels, in the order of `load_shards`.

    Only the index that `load_shards` has written is read, and the size of each shard compared.

    Raises:
        ConfigError: there is no index, it is damaged, or describes other shards than those of the server.
        ServerError: the server fails.
    """
    if (index := find_index(root, split)) is None:
        raise ConfigError(
            f"data.root={root}: has no {split}/{split}.index.npz; write it with sasa-data verify FOLDER where the "
            "shards are, and put it beside them"
        )
    folder, expected = index.rpartition("/")[0], dict[str, int]()

    def sizes_of(identity: np.ndarray) -> np.ndarray | None:
        lines = [re.fullmatch(rf"{LISTING} ([^/]+\.tar) ([0-9]+) [0-9]+", line) for line in identity.tolist()]
        expected.update((urls.joined(folder, line[1]), int(line[2])) for line in lines if line)
        return np.array(list(expected.values())) if len(expected) == len(lines) else None

    content = urls.read_file(index, MAX_INDEX_BYTES) or b""
    try:
        table = parse_index(io.BytesIO(content), len(content), sizes_of)
    except Exception as error:  # as in `load_shards`
        raise ConfigError(f"{index}: is damaged ({printable(shorten(error))}); write it again") from error
    if table is None:
        raise ConfigError(f"{index}: is of another version; write it again with sasa-data verify where the shards are")
    _compare_sizes(index, expected)
    urls.check_ranges(next(iter(expected)))
    if told := table.pop(LEFT_OUT)[0]:
        say(f"{printable(folder)}: left out, {printable(told)}", sys.stderr)
    labels = table.pop("labels")
    return TarMembers(list(expected), **table, versions=None), labels


def _compare_sizes(index: str, expected: dict[str, int]) -> None:
    """Raise ConfigError if the server lacks a shard, or has one of another size."""

    def size(url: str) -> int | None:
        try:
            return urls.size_of(url)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(NUM_READERS) as pool:
        sizes = dict(zip(expected, pool.map(size, expected), strict=True))
    if other := [url for url, found in sizes.items() if found != expected[url]]:
        found = sizes[other[0]]
        raise ConfigError(
            f"{index}: describes other shards: {printable(other[0])} has {expected[other[0]]:,} bytes there, but "
            + ("is missing" if found is None else f"{found:,} on the server")
            + (f", and {len(other) - 1:,} more differ" if len(other) > 1 else "")
            + "; upload the shards and their index together"
        )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # a broken link
        raise ConfigError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"{path}: cannot be read as a shard ({printable(reason)}); fetch or make it again"


def _scan(shards: Sequence[Path], left_out: LeftOut) -> dict[str, np.ndarray]:
    rows: list[tuple[int, str, int, int, int, str]] = []  # label, key, shard, offset, size, name
    for number, path in enumerate(progress_bar(shards, desc="indexing shards", unit="tar")):
        try:
            images, labels = _read_shard(path, left_out)
        except (OSError, ValueError) as error:
            raise ConfigError(_unreadable(path, error)) from error
        if without := sorted(images.keys() - labels.keys()):
            name = printable(images[without[0]][2])
            raise ConfigError(f"{path}: {name} has no label; a .cls file of the same name holds it")
        rows += [(labels[key], key, number, *image) for key, image in images.items()]
    if not rows:
        dotted = f" (a key ends at the first dot, unlike in {printable(left_out.dotted[0])})" if left_out.dotted else ""
        raise ConfigError(f"{shards[0].parent}: its shards hold no image; expected KEY.jpg beside KEY.cls{dotted}")
    label, _, archive, offset, size, names = zip(*sorted(rows), strict=True)
    columns = {"labels": label, "archive": archive, "offset": offset, "size": size, "names": names}
    return {name: np.array(column, dtype=COLUMNS[name]) for name, column in columns.items()}


def _read_shard(path: Path, left_out: LeftOut) -> tuple[dict[str, tuple[int, int, str]], dict[str, int]]:
    """Return the offset, size and name of each key's image, and each key's label; note the members that are no data."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    others: dict[str, list[TarInfo]] = {}  # may be images under other names
    dotted: list[tuple[str, str]] = []  # keys and names of images such as KEY.seg.png, and of labels
    file, num_bytes = open_tar(path)
    with file:
        for member in members_of(file, 0, num_bytes):
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}"
            has_image_name = f".{extension.lower()}" in image_extensions()  # excludes KEY.seg.png
            last = os.path.splitext(base)[1].lower()
            if member.isdir():
                continue
            if is_hidden(member.name):
                left_out.hidden.append(f"{path.name}:{member.name}")
            elif not has_image_name and extension != "cls":
                if member.isfile() and "." not in extension:
                    others.setdefault(key, []).append(member)
                elif last == ".cls" or last in image_extensions():
                    dotted.append((key, member.name))
            elif not member.isfile():
                raise ValueError(f"{member.name} must be stored as a file, but is a link or device")
            elif has_image_name:
                if key in images:
                    raise ValueError(f"{images[key][2]} and {member.name} are two images of one sample")
                images[key] = member.offset_data, member.size, member.name
            else:
                if key in labels:
                    raise ValueError(f"it has two files {member.name}")
                labels[key] = _read_label(file, member)
        for key in sorted((labels.keys() | others.keys()) - images.keys()):
            members = others.get(key, [])
            found = next((m for m in members if _holds_image(file, m)), None)
            if found is not None:
                images[key] = found.offset_data, found.size, found.name
            elif key not in labels:
                left_out.foreign += [f"{path.name}:{m.name}" for m in members if not _is_unsupported(m)]
            elif not any(map(_is_unsupported, members)):
                left_out.foreign.append(f"{path.name}:{key.removeprefix('/')}.cls")
    unread = [m for key, members in others.items() if key not in images for m in members if _is_unsupported(m)]
    left_out.unsupported += [f"{path.name}:{member.name}" for member in unread]
    left_out.dotted += [f"{path.name}:{name}" for key, name in dotted if key not in images or name.endswith(".cls")]
    return images, labels


def _is_unsupported(member: TarInfo) -> bool:
    return OTHER_FORMATS.fullmatch(os.path.splitext(member.name)[1]) is not None


def _holds_image(file: BinaryIO, member: TarInfo) -> bool:
    """Return whether a member of an open archive is an image, judged by its first bytes."""
    file.seek(member.offset_data)
    return is_image(io.BytesIO(file.read(min(member.size, MAX_HEADER_BYTES))))


def _read_label(file: BinaryIO, member: TarInfo) -> int:
    rule = f"{member.name} must hold a class number from 0 to {MAX_CLASSES - 1:,}, but"
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{rule} has {member.size:,} bytes")
    file.seek(member.offset_data)
    text = file.read(member.size).strip()
    if not re.fullmatch(rb"[0-9]+", text) or int(text) >= MAX_CLASSES:
        raise ValueError(f"{rule} holds {text.decode(errors='replace')!r}")
    return int(text)
