"""Read ImageNet's official archives in place to find the classes, the labels and the location of each image."""

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from sasa_train.data.datasets import ImageSet
from sasa_train.data.shards import TarMembers
from sasa_train.data.tars import members_of, open_tar
from sasa_train.dataset_tool.writing import WNID, Originals
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable, progress_bar

GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
MAX_DEVKIT_BYTES = 2**26  # the real one unpacks to a few megabytes
META = "ILSVRC2012_devkit_t12/data/meta.mat"


def check_md5(path: Path, expected: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, _bytes_bar(path, "checking") as bar:
        while block := file.read(2**22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise ConfigError(
            f"{path}: its MD5 is {digest.hexdigest()}, the original's is {expected}; fetch it again, or --no-checksums"
        )


def read_devkit(path: Path) -> tuple[list[str], list[str]]:
    """Return the sorted WordNet ids of the classes, and the id of each val image's class, in file-name order."""
    from scipy.io import loadmat

    try:
        with gzip.open(path) as file:
            content = file.read(MAX_DEVKIT_BYTES + 1)
        if len(content) > MAX_DEVKIT_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_DEVKIT_BYTES:,} bytes")
        found = {m.name: m for m in members_of(io.BytesIO(content), 0, len(content)) if m.isreg()}
        meta, truth = (content[found[name].offset_data :][: found[name].size] for name in (META, GROUND_TRUTH))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        val_wnids = [wnids[int(line)] for line in truth.split()]
    except Exception as error:  # scipy's reader has no common base class
        raise ConfigError(
            f"{path}: cannot be read as ImageNet's devkit ({shorten(repr(error))}); fetch it again"
        ) from error
    if wrong := [wnid for wnid in wnids.values() if not re.fullmatch(WNID, wnid)]:
        raise ConfigError(f"{path}: {wrong[0]!r} is not a WordNet id; fetch it again")
    return sorted(wnids.values()), val_wnids


def index_train(path: Path, classes: list[str]) -> Originals:
    """Find the images in the train archive's nested tars; offsets are relative to the outer archive."""
    rows: list[tuple[str, str, int, int]] = []  # wnid, name, offset, size
    with _tar(path) as (file, num_bytes), _bytes_bar(path, "indexing") as bar:
        for inner in members_of(file, 0, num_bytes):
            _check_member(path, inner, rf"{WNID}\.tar")
            for member in members_of(file, inner.offset_data, inner.offset_data + inner.size):
                _check_image(path, member)
                rows.append((inner.name[:-4], member.name, member.offset_data, member.size))
            bar.update(inner.size)
    if differing := {row[0] for row in rows} ^ set(classes):
        raise ConfigError(
            f"{path}: its classes must be the devkit's {len(classes):,}, but {len(differing):,} are in one of them "
            f"alone, as {min(differing)}; fetch it again"
        )
    return _originals(path, classes, rows)


def index_val(path: Path, classes: list[str], wnids: list[str]) -> Originals:
    """Find the images in the val archive; `wnids` are their classes from the devkit, in file-name order."""
    members = []
    with _tar(path) as (file, num_bytes):
        for member in members_of(file, 0, num_bytes):
            _check_image(path, member)
            members.append((member.name, member.offset_data, member.size))
    if len(members) != len(wnids):
        raise ConfigError(f"{path}: it holds {len(members):,} images, the devkit labels {len(wnids):,}; fetch it again")
    rows = [(wnid, *member) for wnid, member in zip(wnids, sorted(members), strict=True)]
    return _originals(path, classes, rows)


def _originals(path: Path, classes: list[str], rows: list[tuple[str, str, int, int]]) -> Originals:
    if not rows:
        raise ConfigError(f"{path}: it holds no image; fetch it again")
    rows = sorted(rows)
    for row, following in pairwise(rows):
        if row[:2] == following[:2]:
            raise ConfigError(f"{path}: {row[1]} is there twice; fetch it again")
    wnids, names, offsets, sizes = map(np.array, zip(*rows, strict=True))
    source = TarMembers([str(path)], np.zeros(len(rows), dtype=np.int32), offsets, sizes, names)
    images = ImageSet(classes, np.searchsorted(classes, wnids), np.arange(len(rows)), source)
    return Originals(images, names.tolist(), sizes)


@contextmanager
def _tar(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    try:
        file, num_bytes = open_tar(path)
        with file:
            yield file, num_bytes
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a tar ({printable(error)}); fetch it again") from error


def _check_image(path: Path, member: tarfile.TarInfo) -> None:
    _check_member(path, member, rf"[\w-]+(?i:{'|'.join(map(re.escape, IMG_EXTENSIONS))})")


def _check_member(path: Path, member: tarfile.TarInfo, pattern: str) -> None:
    """Raise ConfigError unless a member is a regular file with a plain name (no link, absolute path or `..`)."""
    if not member.isreg() or not re.fullmatch(pattern, member.name, re.ASCII):
        raise ConfigError(
            f"{path}: its member {member.name!r} is refused; ImageNet's are plain files with plain names, so this is "
            "another archive: fetch it again"
        )


def _bytes_bar(path: Path, doing: str) -> tqdm:
    return progress_bar(total=path.stat().st_size, desc=f"{doing} {path.name}", unit="B", unit_scale=True, leave=True)
