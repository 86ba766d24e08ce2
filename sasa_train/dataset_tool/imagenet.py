"""Read ImageNet's official archives in place to find the classes, the labels and the location of each image."""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from sasa_train.data.datasets import ImageSet
from sasa_train.data.shards import TarMembers
from sasa_train.dataset_tool.writing import WNID, Originals
from sasa_train.refusal import ConfigError

GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
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
        with tarfile.open(path, "r:gz") as archive:
            meta, truth = (archive.extractfile(name).read() for name in (META, GROUND_TRUTH))  # type: ignore[union-attr]
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        val_wnids = [wnids[int(line)] for line in truth.split()]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read as ImageNet's devkit ({error}); fetch it again") from error
    if wrong := [wnid for wnid in wnids.values() if not re.fullmatch(WNID, wnid)]:
        raise ConfigError(f"{path}: {wrong[0]!r} is not a WordNet id; fetch it again")
    return sorted(wnids.values()), val_wnids


def index_train(path: Path, classes: list[str]) -> Originals:
    """Find the images in the train archive's nested tars; offsets are relative to the outer archive."""
    rows: list[tuple[str, str, int, int]] = []  # wnid, name, offset, size
    with _tar(path) as outer, _bytes_bar(path, "indexing") as bar:
        for inner in outer:
            _check_member(path, inner, rf"{WNID}\.tar")
            with tarfile.open(fileobj=outer.extractfile(inner), mode="r:") as images:
                for member in images:
                    _check_image(path, member)
                    rows.append((inner.name[:-4], member.name, inner.offset_data + member.offset_data, member.size))
            bar.update(inner.size)
    if differing := {row[0] for row in rows} ^ set(classes):
        raise ConfigError(
            f"{path}: its classes must be the devkit's {len(classes):,}, but {len(differing):,} are in one of them "
            f"alone, as {min(differing)}; fetch it again"
        )
    return _originals(path, classes, rows)


def index_val(path: Path, classes: list[str], wnids: list[str]) -> Originals:
    """Find the images in the val archive; `wnids` are their classes from the devkit, in file-name order."""
    with _tar(path) as archive:
        members = archive.getmembers()
    for member in members:
        _check_image(path, member)
    if len(members) != len(wnids):
        raise ConfigError(f"{path}: it holds {len(members):,} images, the devkit labels {len(wnids):,}; fetch it again")
    members.sort(key=lambda member: member.name)
    rows = [(wnid, m.name, m.offset_data, m.size) for wnid, m in zip(wnids, members, strict=True)]
    return _originals(path, classes, rows)


def _originals(path: Path, classes: list[str], rows: list[tuple[str, str, int, int]]) -> Originals:
    rows = sorted(rows)
    for row, following in pairwise(rows):
        if row[:2] == following[:2]:
            raise ConfigError(f"{path}: {row[1]} is there twice; fetch it again")
    wnids, names, offsets, sizes = map(np.array, zip(*rows, strict=True))
    source = TarMembers([str(path)], np.zeros(len(rows), dtype=np.int32), offsets, sizes, names)
    images = ImageSet(classes, np.searchsorted(classes, wnids), np.arange(len(rows)), source)
    return Originals(images, names.tolist(), sizes)


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as a tar ({error}); fetch it again") from error


def _check_image(path: Path, member: tarfile.TarInfo) -> None:
    _check_member(path, member, rf"[\w-]+(?i:{'|'.join(map(re.escape, IMG_EXTENSIONS))})")


def _check_member(path: Path, member: tarfile.TarInfo, pattern: str) -> None:
    """Raise ConfigError unless a member is a regular file with a plain name (no link, absolute path or `..`)."""
    is_plain = member.isreg() and not member.issparse()
    if not is_plain or not re.fullmatch(pattern, member.name, re.ASCII):
        raise ConfigError(
            f"{path}: its member {member.name!r} is refused; ImageNet's are plain files with plain names, so this is "
            "another archive: fetch it again"
        )


def _bytes_bar(path: Path, doing: str) -> tqdm:
    return tqdm(total=path.stat().st_size, desc=f"{doing} {path.name}", unit="B", unit_scale=True, disable=None)
