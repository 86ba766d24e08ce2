"""Fingerprints of data sets, which let a resumed run detect and report changes to its data.

A fingerprint covers the count, names and order of all images, and the bytes of a sample of them. For ImageNet,
computing it takes a few seconds.
"""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from sasa_train.data.class_names import composed
from sasa_train.data.datasets import Files, ImageSet, UnreadableImage
from sasa_train.data.hf_sets import HfImages
from sasa_train.data.own_sets import OwnItems
from sasa_train.data.shards import TarMembers
from sasa_train.terminal import printable

MAX_READ = 2000  # files per data set whose bytes are read
MAX_LINES = 10  # differences that are reported
NUM_READERS = 8  # threads, because a network disk takes milliseconds per file
UNREADABLE = b"unreadable"
NUMBER = re.compile(r"(^|/)\d{8}-")  # ordering prefix added by `sasa-data shard`, not part of the name

SOURCES = {
    "files": "in class folders",
    "list": "in a list",
    "shards": "in tar shards",
    "memory": "in memory",
    "hf": "in a Hugging Face data set",
    "own": "in a data set of your own",
}
PIXELS = {"memory", "own"}  # of which pixels are compared, not files


def fingerprint(images: ImageSet, read: dict[bytes, int] | None = None) -> dict[str, Any]:
    """Return a fingerprint as a dict: `source`, `labels` (a digest) and `classes`, a list with one dict per class.

    read: receives the indices of the images whose bytes were read, by the digest of each.

    Each class's `content` is a digest of `num_read` of its images: the bytes of a sample of its files, the pixels of
    such a sample of the user's own set or, for a data set in memory, all pixels. Image files and tar shards made from
    them yield the same digests.
    """
    by_label = np.argsort(images.labels, kind="stable")
    counts = np.bincount(images.labels, minlength=len(images.classes))
    members = np.split(by_label, np.cumsum(counts)[:-1])
    contents = _in_memory(images, members) if isinstance(images.source, Tensor) else _on_disk(images, members, read)
    naming = _naming(images.source)
    classes = [
        {"name": name, "num_images": len(of_class), "names": digest_of(_names(images, of_class, naming)), **content}
        for name, of_class, content in zip(images.classes, members, contents, strict=True)
    ]
    kinds = {Tensor: "memory", Files: "files", TarMembers: "shards", HfImages: "hf", OwnItems: "own"}
    kind = next(name for source, name in kinds.items() if isinstance(images.source, source))
    kind = "list" if isinstance(images.source, Files) and images.source.list_path else kind
    return {"source": kind, "labels": digest_of([images.labels.astype("<i8").tobytes()]), "classes": classes}


def fingerprints(train: ImageSet, val: ImageSet) -> tuple[dict[str, Any], str]:
    """Return the fingerprints of train and val, and a warning if images that were read are in both, otherwise ""."""
    of_train, of_val = dict[bytes, int](), dict[bytes, int]()
    found = {"train": fingerprint(train, of_train), "val": fingerprint(val, of_val)}
    same = [(of_val[digest], of_train[digest]) for digest in of_val if digest in of_train]
    both = [(val.name(i), train.name(j)) for i, j in same if _is_readable(val, i)]
    if not both:
        return found, ""
    example = " = ".join(map(printable, min(both)))
    return found, (
        f"images that are in train and in val, byte for byte: {len(both):,} of {len(of_val):,} that were compared, as "
        f"in {example}; top1 on val is too high; `sasa-data verify` lists such images"
    )


def _is_readable(images: ImageSet, index: int) -> bool:
    """Whether a file can be opened as an image; many an error page or placeholder has the same bytes as another."""
    try:
        images.read(index, lambda image: None)
    except UnreadableImage:
        return False
    return True


def differences(old: dict[str, Any], new: dict[str, Any], split: str) -> list[str]:
    """List the changes between two fingerprints of `split` in at most MAX_LINES lines of text."""
    lines = _set_differences(old, new)
    rest = len(lines) - MAX_LINES
    return [f"{split}: {line}" for line in lines[:MAX_LINES]] + ([f"{split}: and {rest:,} more"] if rest > 0 else [])


def _set_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    kinds = old["source"], new["source"]
    if kinds[0] != kinds[1] and not PIXELS.isdisjoint(kinds):  # pixels and files cannot be compared
        return [f"the images were {SOURCES[kinds[0]]}, now they are {SOURCES[kinds[1]]}"]
    before, after = _by_name(old["classes"]), _by_name(new["classes"])
    lines = []
    for name in before | after:
        if name not in after:
            lines.append(f"class {name} is gone")
        elif name not in before:
            lines.append(f"class {name} is new")
        else:
            lines += _class_differences(name, before[name], after[name], is_same_kind=kinds[0] == kinds[1])
    if not lines and list(before) != list(after):
        lines.append("the order of the classes changed")
    if not lines and old["labels"] != new["labels"]:
        lines.append("the order of the images changed")
    return lines


def _class_differences(name: str, old: dict[str, Any], new: dict[str, Any], is_same_kind: bool) -> list[str]:
    if old["num_images"] != new["num_images"]:  # so the digests differ too
        return [f"class {name} had {old['num_images']:,} images, now {new['num_images']:,}"]
    lines = []
    if is_same_kind and old["names"] != new["names"]:
        lines.append(f"names changed in class {name}")
    if old["num_read"] != new["num_read"]:  # classes were added or removed, so the sample differs
        return lines
    if old["num_unreadable"] != new["num_unreadable"]:
        before, now = old["num_unreadable"], new["num_unreadable"]
        lines.append(f"of {new['num_read']:,} images of class {name}, {before:,} could not be read, now {now:,} cannot")
    elif old["content"] != new["content"]:
        lines.append(f"the content of class {name} changed")
    return lines


def _by_name(classes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a dict from printable class names to entries; duplicate names are numbered (ImageNet has crane twice)."""
    seen: Counter[str] = Counter()
    found = {}
    for entry in classes:
        name = f"'{printable(*composed([entry['name']]))}'"
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = entry
    return found


def _in_memory(images: ImageSet, members: list[np.ndarray]) -> list[dict[str, Any]]:
    assert isinstance(images.source, Tensor)
    arrays = (images.source[images.positions[of_class]].numpy() for of_class in members)
    digests = (digest_of([str(pixels.shape).encode(), pixels.tobytes()]) for pixels in arrays)
    return [{"num_read": len(m), "num_unreadable": 0, "content": d} for m, d in zip(members, digests, strict=True)]


def _on_disk(images: ImageSet, members: list[np.ndarray], read: dict[bytes, int] | None) -> list[dict[str, Any]]:
    samples = _samples(members)
    indices = np.concatenate(samples).tolist()
    num_threads = 1 if isinstance(images.source, OwnItems) else NUM_READERS  # the user's code may not bear threads
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(lambda index: _file_digest(images, index), indices))
    if read is not None:
        read.update(zip(found, indices, strict=True))
        read.pop(UNREADABLE, None)
    digests = iter(found)
    of_classes = [[next(digests) for _ in sample] for sample in samples]
    return [
        {"num_read": len(own), "num_unreadable": own.count(UNREADABLE), "content": digest_of(own)} for own in of_classes
    ]


def _samples(members: list[np.ndarray]) -> list[np.ndarray]:
    """Select evenly spaced images of each class; only the bytes of these images are read.

    The selection in a class depends only on its size and the number of classes, so that adding or removing images in
    one class does not appear as a change in the others.
    """
    if sum(map(len, members)) <= MAX_READ:
        return members
    most, every = max(1, MAX_READ // len(members)), math.ceil(len(members) / MAX_READ)
    samples = []
    for label, of_class in enumerate(members):
        count = min(len(of_class), most) if label % every == 0 else 0
        samples.append(of_class[(2 * np.arange(count) + 1) * len(of_class) // max(2 * count, 1)])
    return samples


def _file_digest(images: ImageSet, index: int) -> bytes:
    try:
        return hashlib.blake2b(images.read_bytes(index), digest_size=8).digest()
    except (OSError, ValueError):
        return UNREADABLE


def _names(images: ImageSet, members: np.ndarray, naming: Callable[[int], str] | None) -> Iterable[bytes]:
    """Return the images' names as `naming` gives them for their positions; [] for images without names."""
    if naming is None:
        return []
    names = map(naming, images.positions[members].tolist())
    return (name.encode(errors="surrogateescape") + b"\0" for name in names)


def _naming(source: Files | TarMembers | HfImages | OwnItems | Tensor) -> Callable[[int], str] | None:
    """Return the function that names images, or None if they have no names.

    A name is a path relative to the class folder or, without class folders, to the folder of all images; or a shard
    member's name without its prefix.
    """
    if isinstance(source, TarMembers):
        return lambda position: NUMBER.sub(r"\1", str(source.names[position]))
    if isinstance(source, Tensor | HfImages) or source.paths is None:
        return None
    paths = source.paths
    if isinstance(source, Files) and not source.list_path:
        top = os.path.join(source.folder, "")
        return lambda position: paths[position].removeprefix(top).partition(os.sep)[2]
    folders = {folder: os.path.abspath(folder) for folder in {os.path.dirname(path) for path in paths}}
    common = os.path.commonpath(list(folders.values()))
    shown = {folder: os.path.relpath(path, common) for folder, path in folders.items()}

    def name(position: int) -> str:
        folder, file = os.path.split(paths[position])
        return file if shown[folder] == "." else os.path.join(shown[folder], file)

    return name


def digest_of(parts: Iterable[bytes]) -> str:
    """Return a digest of the concatenated parts as 16 hex digits."""
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
