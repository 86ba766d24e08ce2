"""Tar shards in the webdataset layout, read in place with one open file per shard instead of one per image.

A sample is an image `KEY.jpg` and its label `KEY.cls`. An index of offsets, kept beside the shards, lets a single
`pread` fetch any image, so ordering, workers and resuming work as they do for class folders. Images are ordered by
label and key, so shards that sasa-data creates from class folders yield the same images in the same order.
"""

import io
import os
import re
import resource
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from sasa_train.files import write_atomic
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}


@dataclass
class TarMembers:
    """Files in uncompressed tar archives, each given by its archive, its offset and size in bytes, and its name."""

    archives: list[str]
    archive: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: np.ndarray

    def open(self, position: int) -> BinaryIO:
        """Read the member's bytes into memory; if the archive is truncated, fewer than `size` bytes are read."""
        with _opening:
            file = _opened(self.archives[self.archive[position]])
        return io.BytesIO(os.pread(file.fileno(), int(self.size[position]), int(self.offset[position])))

    def name(self, position: int) -> str:
        return f"{self.archives[self.archive[position]]}:{self.names[position]}"


_opening = threading.Lock()


@cache
def _opened(path: str) -> BinaryIO:
    # All readers can share one open file, because pread does not use the file position. ImageNet may have more shards
    # than the default limit on open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open(path, "rb")


def find_shards(root: Path, split: str) -> list[Path]:
    """Find `root/train/*.tar` or `root/*train*.tar`; val may also be named validation or test."""
    for name in SPLIT_NAMES[split]:
        found = sorted((root / name).glob("*.tar"))
        if not found and not (root / name).is_dir():  # ImageNet's archives may be beside class folders
            word = re.compile(rf"(^|[^a-z]){name}([^a-z]|$)")  # so that interval-train does not match val
            found = sorted(path for path in root.glob("*.tar") if word.search(path.stem.lower()))
        if found:
            return found
    return []


def load_shards(shards: Sequence[Path], split: str) -> tuple[TarMembers, np.ndarray]:
    """Return the images in a split's shards and their int64 labels, ordered by (label, key).

    The index is read from `SPLIT.index.npz` beside the shards, or built and saved there if the folder is writable.

    Raises:
        ConfigError: a shard is not a complete tar file, an image has no label, or there are no images.
    """
    index = shards[0].with_name(f"{split}.index.npz")
    identity = np.array([f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in shards])
    try:
        with np.load(index) as saved:
            table = dict(saved)
        is_current = np.array_equal(table.pop("identity"), identity)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing or incomplete
        is_current = False
    if not is_current:
        table = _scan(shards)
        buffer = io.BytesIO()
        np.savez(buffer, identity=identity, **table)  # type: ignore[arg-type]
        try:
            write_atomic(index, buffer.getbuffer())
        except OSError as error:
            print(f"{index}: cannot be written ({error.strerror}); the shards will be scanned at every start")
    labels = table.pop("labels")
    return TarMembers([str(p) for p in shards], **table), labels


def _scan(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    rows: list[tuple[int, str, int, int, int, str]] = []  # label, key, shard, offset, size, name
    for number, path in enumerate(tqdm(shards, desc="indexing shards", unit="tar", disable=None, leave=False)):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    key = f"{folder}/{stem}"
                    if member.isfile() and f".{extension.lower()}" in IMG_EXTENSIONS:  # excludes KEY.seg.png
                        if key in images:
                            raise ValueError(f"{images[key].name} and {member.name} are two images of one sample")
                        images[key] = member
                    elif member.isfile() and extension == "cls":
                        labels[key] = int(archive.extractfile(member).read())  # type: ignore[union-attr]
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: cannot be read as a shard ({printable(error)}); fetch or make it again"
            ) from error
        if without := sorted(images.keys() - labels.keys()):
            name = printable(images[without[0]].name)
            raise ConfigError(f"{path}: {name} has no label; a .cls file of the same name holds it")
        rows += [(labels[k], k, number, m.offset_data, m.size, m.name) for k, m in images.items()]
    if not rows:
        raise ConfigError(f"{shards[0].parent}: its shards hold no image; expected KEY.jpg beside KEY.cls")
    label, _, archive_number, offset, size, names = zip(*sorted(rows), strict=True)
    numbers = {"labels": label, "offset": offset, "size": size}
    arrays = {name: np.array(column, dtype=np.int64) for name, column in numbers.items()}
    return arrays | {"archive": np.array(archive_number, dtype=np.int32), "names": np.array(names)}
