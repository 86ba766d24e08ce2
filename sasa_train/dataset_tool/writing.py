"""Class folders and tar shards, each whole or not there at all, so that a stopped command goes on with the rest."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sasa_train.data.datasets import Files, ImageSet
from sasa_train.data.randomness import fixed_order
from sasa_train.data.shards import TarMembers, find_shards, shard_path, write_shards
from sasa_train.files import sync_folder, write_atomic
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

WNID = r"n[0-9]{8}"
OVERHEAD = 2048  # bytes an image takes beside its own: tar headers and label, or half a disk block and an inode


@dataclass
class Originals:
    """A split's image files, in the order of label and name: image i is `names[i]`, of `sizes[i]` bytes."""

    images: ImageSet
    names: list[str]
    sizes: np.ndarray

    def read(self, index: int) -> bytes:
        assert isinstance(self.images.source, Files | TarMembers)
        with self.images.source.open(int(self.images.positions[index])) as file:
            data = file.read()
        if len(data) != self.sizes[index]:
            name = printable(self.images.name(index))
            raise ConfigError(
                f"{name}: {len(data):,} of {self.sizes[index]:,} bytes are there; was it cut off, or is it being made?"
            )
        return data


def write_folders(dest: Path, splits: dict[str, Originals], before: Callable[[], None]) -> None:
    """DEST/SPLIT/CLASS/NAME for every image whose class folder is not there; `before()` is called before the first."""
    if find_shards(dest, "train") or find_shards(dest, "val"):
        raise ConfigError(f"DEST={dest} holds tar shards already, which training would read; give another folder")
    for path in dest.iterdir():
        if re.fullmatch(rf"(train|val)-{WNID}\.tmp", path.name):  # of a command that was stopped
            shutil.rmtree(path)
    missing = {name: _missing_classes(dest / name, split) for name, split in splits.items()}
    if not _is_to_write(dest, splits, {name: np.concatenate(of_class) for name, of_class in missing.items()}):
        return
    before()
    for name, split in splits.items():
        done = len(split.names) - sum(len(members) for members in missing[name])
        with tqdm(total=len(split.names), initial=done, desc=f"writing {name}", unit="img", disable=None) as bar:
            for members in missing[name]:
                if len(members):
                    _write_class(dest, name, split, members)
                    bar.update(len(members))


def _missing_classes(folder: Path, split: Originals) -> list[np.ndarray]:
    """For each class its images, or none where its folder is there."""
    starts = np.searchsorted(split.images.labels, np.arange(len(split.images.classes) + 1))
    missing = []
    present = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    for name, start, end in zip(split.images.classes, starts, starts[1:], strict=False):
        path = present.pop(name, None)
        if path is not None and len(os.listdir(path)) != end - start:
            raise ConfigError(f"{path}: holds {len(os.listdir(path))} files, the archive {end - start}; remove it")
        missing.append(np.arange(start, start if path else end))
    if present:
        raise ConfigError(
            f"{folder} must hold the archive's classes alone, but {printable(min(present))} is there; remove it"
        )
    return missing


def _write_class(dest: Path, name: str, split: Originals, members: np.ndarray) -> None:
    """A class folder, whole or not at all; aside is outside of DEST/SPLIT, where it would be taken for a class."""
    wnid = split.images.classes[split.images.labels[members[0]]]
    aside = dest / f"{name}-{wnid}.tmp"
    aside.mkdir()
    for i in members:
        (aside / split.names[i]).write_bytes(split.read(int(i)))
    os.sync()  # once a class; a sync of every file would take longer than writing it
    (dest / name).mkdir(exist_ok=True)
    aside.rename(dest / name / wnid)
    sync_folder(dest / name)


def write_all_shards(
    dest: Path, splits: dict[str, Originals], images_per_shard: int, before: Callable[[], None] = lambda: None
) -> None:
    """DEST/SPLIT/SPLIT-000000.tar, ..., those that are not there; `before()` is called before the first."""
    classes = splits["train"].images.classes
    _claim(dest, splits, images_per_shard)
    write_atomic(dest / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    orders = {name: fixed_order(len(split.names)) for name, split in splits.items()}
    missing = {}
    for name, order in orders.items():
        shards = np.arange(len(order)) // images_per_shard
        is_there = np.array([shard_path(dest / name, name, n).exists() for n in range(shards[-1] + 1)])
        missing[name] = order[~is_there[shards]]
    if not _is_to_write(dest, splits, missing):
        return
    before()
    for name, split in splits.items():
        write_shards(dest / name, name, split.names, split.images.labels, split.read, orders[name], images_per_shard)


def _claim(dest: Path, splits: dict[str, Originals], images_per_shard: int) -> None:
    """Refuse a DEST whose contents have another origin; DEST/shards.json says where its shards are from."""
    for name in splits:
        if any(path.is_dir() for path in (dest / name).glob("*")):
            raise ConfigError(f"DEST={dest} holds class folders already; give another folder for the shards")
    identity = {"images_per_shard": images_per_shard} | {name: _fingerprint(split) for name, split in splits.items()}
    path = dest / "shards.json"
    if not path.exists():
        if find_shards(dest, "train") or find_shards(dest, "val"):
            raise ConfigError(f"DEST={dest} holds tar shards that this command did not write; give another folder")
        write_atomic(path, (json.dumps(identity, indent=1) + "\n").encode())
        return
    try:
        before = json.loads(path.read_text())
        differing = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove DEST={dest} and start anew") from error
    if differing:
        told = "; ".join(f"{key}: {before.get(key)} there, {identity.get(key)} here" for key in differing)
        raise ConfigError(
            f"DEST={dest} holds shards of another source, or with another --images-per-shard ({told}); give another "
            "folder, or the same source and number"
        )


def _fingerprint(split: Originals) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for label, name, size in zip(split.images.labels, split.names, split.sizes, strict=True):
        digest.update(f"{split.images.classes[label]}/{name} {size}\n".encode(errors="surrogateescape"))
    return f"{len(split.names)} images, names and sizes {digest.hexdigest()}"


def _is_to_write(dest: Path, splits: dict[str, Originals], missing: dict[str, np.ndarray]) -> bool:
    """Whether any of the images is missing, and said so; there must be room for those that are."""
    counts = " and ".join(f"{len(split.names):,} {name}" for name, split in splits.items())
    print(f"{dest}: {counts} images of {len(splits['train'].images.classes):,} classes")
    num_missing = sum(len(members) for members in missing.values())
    if not num_missing:
        print("they are all there already; nothing to do")
        return False
    needed = sum(int(splits[name].sizes[members].sum()) for name, members in missing.items()) + num_missing * OVERHEAD
    free = shutil.disk_usage(dest).free
    if needed > free:
        raise ConfigError(
            f"DEST={dest}: {needed / 1e9:,.2f} GB are to be written, but only {free / 1e9:,.2f} GB are free; make "
            "room, or give a folder on another disk"
        )
    return True
