"""Tar shards in the webdataset layout, read in place: one open file a shard instead of one an image.

A sample is an image `KEY.jpg` and its label `KEY.cls`. An index of offsets, kept beside the shards, makes any image one
`pread`, so that order, workers and resume are what they are for class folders. Images are ordered by label and key:
shards written here from class folders are the same data set as those folders, image by image.
"""

import io
import os
import re
import resource
import tarfile
import threading
import zipfile
from collections.abc import Callable, Sequence
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
    """Files inside uncompressed tar archives: for each its archive, offset and size in bytes, and name."""

    archives: list[str]
    archive: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: np.ndarray

    def open(self, position: int) -> BinaryIO:
        """The member's bytes; fewer than `size` where the archive is cut off."""
        with _opening:
            file = _opened(self.archives[self.archive[position]])
        return io.BytesIO(os.pread(file.fileno(), int(self.size[position]), int(self.offset[position])))

    def name(self, position: int) -> str:
        return f"{self.archives[self.archive[position]]}:{self.names[position]}"


_opening = threading.Lock()


@cache
def _opened(path: str) -> BinaryIO:
    """Shared by all readers, as pread keeps no position; ImageNet may come in more shards than a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open(path, "rb")


def find_shards(root: Path, split: str) -> list[Path]:
    """`root/train/*.tar`, or `root/*train*.tar`; for val also under the names validation and test."""
    for name in SPLIT_NAMES[split]:
        found = sorted((root / name).glob("*.tar"))
        if not found and not (root / name).is_dir():  # where class folders are, ImageNet's archives may lie beside them
            word = re.compile(rf"(^|[^a-z]){name}([^a-z]|$)")  # so that interval-train is no val
            found = sorted(path for path in root.glob("*.tar") if word.search(path.stem.lower()))
        if found:
            return found
    return []


def load_shards(shards: Sequence[Path], split: str) -> tuple[TarMembers, np.ndarray]:
    """The images of a split's shards and their labels, int64, in the order of (label, key).

    The index is read from `SPLIT.index.npz` beside the shards, or made, and kept there where the folder can be written.

    Raises:
        ConfigError: a shard that is no whole tar, an image without a label, or no image at all.
    """
    index = shards[0].with_name(f"{split}.index.npz")
    identity = np.array([f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in shards])
    try:
        with np.load(index) as saved:
            table = dict(saved)
        is_current = np.array_equal(table.pop("identity"), identity)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or not whole
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
                    if member.isfile() and f".{extension.lower()}" in IMG_EXTENSIONS:  # so KEY.seg.png is none
                        if key in images:
                            raise ValueError(f"{images[key].name} and {member.name} are two images of one sample")
                        images[key] = member
                    elif member.isfile() and extension == "cls":
                        labels[key] = int(archive.extractfile(member).read())  # type: ignore[union-attr]
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: cannot be read as a shard ({printable(str(error))}); fetch or make it again"
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


def write_shards(
    folder: Path,
    split: str,
    keys: Sequence[str],
    labels: np.ndarray,
    read: Callable[[int], bytes],
    order: np.ndarray,
    images_per_shard: int,
) -> None:
    """Write `folder/SPLIT-000000.tar`, ...: image i under `keys[i]` (its name with the extension), in `order`.

    Keys are numbered by i, so that they sort as the images do. A shard that is already there is left as it is: a
    command that was stopped goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [order[start : start + images_per_shard] for start in range(0, len(order), images_per_shard)]
    with tqdm(total=len(order), desc=f"writing {split}", unit="img", disable=None) as bar:
        for number, chunk in enumerate(chunks):
            path = shard_path(folder, split, number)
            if not path.exists():
                aside = path.with_name(f"{path.name}.tmp")
                with tarfile.open(aside, "w:") as archive:
                    for i in chunk:
                        stem, _, extension = keys[i].rpartition(".")
                        key = f"{i:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)}"
                        _add(archive, f"{key}.{extension}", read(int(i)))
                        _add(archive, f"{key}.cls", str(labels[i]).encode())
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, path)
            bar.update(len(chunk))


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:06d}.tar"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
