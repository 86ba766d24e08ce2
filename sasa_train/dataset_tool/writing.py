"""Write class folders and tar shards atomically; running an interrupted command again writes only missing ones."""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sasa_train.data.datasets import Files, ImageSet
from sasa_train.data.fingerprint import digest_of
from sasa_train.data.randomness import fixed_order
from sasa_train.data.shards import SPLIT_NAMES, TarMembers, find_shards
from sasa_train.files import inside, open_regular, sync_folder, write_atomic
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import MAX_NAMES, printable, progress_bar

WNID = r"n[0-9]{8}"
OVERHEAD = 2048  # bytes per image in addition to its file: tar headers and label, or half a disk block and an inode
MAX_IDENTITY_BYTES = 2**16  # of shards.json
Missing = dict[Path, np.ndarray]  # path of a folder or shard to write -> its images


@dataclass
class Originals:
    """The image files of a split, ordered by label and name; image i is `names[i]` and has `sizes[i]` bytes."""

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
    """Write the class folders DEST/SPLIT/CLASS that do not exist yet; call `before` once, before the first write."""
    if any(find_shards(dest, split) for split in SPLIT_NAMES):
        raise ConfigError(f"DEST={dest} holds tar shards already, which training would read; give another folder")
    for path in dest.iterdir():
        if re.fullmatch(rf"(train|val)-{WNID}\.tmp", path.name):  # left behind by a stopped command
            shutil.rmtree(path)
    missing = {name: _missing_classes(dest / name, split) for name, split in splits.items()}
    _write_missing(dest, splits, missing, _write_class, before)


def _missing_classes(folder: Path, split: Originals) -> Missing:
    starts = np.searchsorted(split.images.labels, np.arange(len(split.images.classes) + 1))
    missing = {}
    present = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    for name, start, end in zip(split.images.classes, starts, starts[1:], strict=False):
        path = present.pop(name, None)
        if path is None and end > start:
            missing[folder / name] = np.arange(start, end)
        elif path is not None and len(os.listdir(path)) != end - start:
            raise ConfigError(f"{path}: holds {len(os.listdir(path))} files, the archive {end - start}; remove it")
    if present:
        raise ConfigError(
            f"{folder} must hold the archive's classes alone, but {printable(min(present))} is there; remove it"
        )
    return missing


def _write_class(path: Path, split: Originals, members: np.ndarray) -> None:
    # The temporary folder is not in DEST/SPLIT, because it would be mistaken for a class there.
    aside = path.parents[1] / f"{path.parent.name}-{path.name}.tmp"
    aside.mkdir()
    for i in members:
        (aside / split.names[i]).write_bytes(split.read(int(i)))
    os.sync()  # once per class, because syncing each file would take longer than writing it
    path.parent.mkdir(exist_ok=True)
    aside.rename(path)
    sync_folder(path.parent)


def write_all_shards(
    dest: Path, splits: dict[str, Originals], images_per_shard: int, before: Callable[[], None] = lambda: None
) -> None:
    """Write the shards DEST/SPLIT/SPLIT-000000.tar, ... that do not exist yet.

    `before` is called once, before the first write. A member's name starts with the image's index in eight
    digits, so that members sort in the order of the images.
    """
    classes = splits["train"].images.classes
    _claim(dest, splits, images_per_shard)
    write_atomic(dest / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    missing: dict[str, Missing] = {name: {} for name in splits}
    for name, split in splits.items():
        order = fixed_order(len(split.names))
        for number, start in enumerate(range(0, len(order), images_per_shard)):
            path = dest / name / f"{name}-{number:06d}.tar"
            # A shard that was damaged later is not a whole number of records, or empty.
            if not path.exists() or path.stat().st_size % tarfile.RECORDSIZE or not path.stat().st_size:
                missing[name][path] = order[start : start + images_per_shard]
    _write_missing(dest, splits, missing, _write_shard, before)


def _write_shard(path: Path, split: Originals, members: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # left behind by a stopped command
    with aside.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w:") as archive:
            for i in members:
                stem, extension = os.path.splitext(split.names[i])
                extension = "" if extension.lower() == ".cls" else extension  # the label's
                key = f"{i:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)}"
                label = str(split.images.labels[i]).encode()
                for name, data in ((f"{key}{extension}", split.read(int(i))), (f"{key}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _claim(dest: Path, splits: dict[str, Originals], images_per_shard: int) -> None:
    """Raise ConfigError if DEST has class folders or other shards; record the shards' source in DEST/shards.json."""
    for name in splits:
        if any(path.is_dir() for path in (dest / name).glob("*")):
            raise ConfigError(f"DEST={dest} holds class folders already; give another folder for the shards")
    identity = {"images_per_shard": images_per_shard} | {name: _fingerprint(split) for name, split in splits.items()}
    path = dest / "shards.json"
    if not os.path.lexists(path):
        if any(find_shards(dest, split) for split in SPLIT_NAMES):
            raise ConfigError(f"DEST={dest} holds tar shards that this command did not write; give another folder")
        write_atomic(path, (json.dumps(identity, indent=1) + "\n").encode())
        return
    try:
        with open_regular(path) as file:
            before = json.loads(file.read(MAX_IDENTITY_BYTES))
        differing = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({shorten(error)}); remove DEST={dest} and start anew") from error
    if differing:
        told = "; ".join(
            f"{shorten(key)}: {shorten(before.get(key))} there, {identity.get(key)} here"
            for key in differing[:MAX_NAMES]
        )
        raise ConfigError(
            f"DEST={dest} holds shards of another source, or with another --images-per-shard ({told}); give another "
            "folder, or the same source and number"
        )


def _fingerprint(split: Originals) -> str:
    rows = zip(split.images.labels, split.names, split.sizes, strict=True)
    lines = (f"{split.images.classes[label]}/{name} {size}\n" for label, name, size in rows)
    digest = digest_of(line.encode(errors="surrogateescape") for line in lines)
    return f"{len(split.names)} images, names and sizes {digest}"


def _write_missing(
    dest: Path,
    splits: dict[str, Originals],
    missing: dict[str, Missing],
    write: Callable[[Path, Originals, np.ndarray], None],
    before: Callable[[], None],
) -> None:
    """Write the missing folders or shards of each split with a progress bar, after checking the disk space."""
    counts = " and ".join(f"{len(split.names):,} {name}" for name, split in splits.items())
    print(f"{dest}: {counts} images of {len(splits['train'].images.classes):,} classes")
    parts = [(splits[name], members) for name in splits for members in missing[name].values()]
    if not parts:
        print("they are all there already; nothing to do")
        return
    needed = sum(int(split.sizes[members].sum()) + len(members) * OVERHEAD for split, members in parts)
    free = shutil.disk_usage(dest).free
    if needed > free:
        raise ConfigError(
            f"DEST={dest}: {needed / 1e9:,.2f} GB are to be written, but only {free / 1e9:,.2f} GB are free; make "
            "room, or give a folder on another disk"
        )
    for name in splits:
        inside(dest.resolve(), name)
    before()
    for name, split in splits.items():
        done = len(split.names) - sum(len(members) for members in missing[name].values())
        total = len(split.names)
        with progress_bar(total=total, initial=done, desc=f"writing {name}", unit="img", leave=True) as bar:
            for path, members in missing[name].items():
                write(path, split, members)
                bar.update(len(members))
