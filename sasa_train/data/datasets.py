"""Labelled data sets, on disk or in memory, and fixed, class-balanced subsets of them."""

import dataclasses
import io
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets as tv

from sasa_train.config.keys import DATA_SETS, DataConfig
from sasa_train.data.decoding import RANGE_REMEDY, check_range, decoding_of, open_image
from sasa_train.data.randomness import fixed_order
from sasa_train.data.shard_index import MAX_CLASSES
from sasa_train.data.shards import TarMembers, check_image_size, find_shards, load_shards
from sasa_train.files import open_regular
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

# The formats of torchvision's IMG_EXTENSIONS, plus GIF, because real data sets contain GIF files with other extensions.
# MPO files open as JPEG. No other format is tried: EPS would start Ghostscript, and every decoder adds to the attack
# surface.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `read` rejects such images

PAUSES = (0.1, 1.0)  # seconds to wait before each retry of a failed read
MAX_CLASSES_BYTES = 2**24  # of classes.txt
MIN_LABELS = 1000  # smaller labels are accepted from any number of images, because a small subset may lack classes
DIGITS_VAL_FRACTION = 0.2
NUM_LOOKED_AT = 5  # images of each split
MAX_NAMES = 5  # maximum number of names shown from a long list

Shaped = TypeVar("Shaped")


class UnreadableImage(Exception):
    """Raised for a file that is missing, truncated, damaged or not an image; `name` and `reason` describe it."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that a worker process can pickle the exception
        self.name, self.reason = name, reason


@dataclass
class Files:
    """Image files given by their paths; `folder` contains the class folders."""

    paths: list[str]
    folder: str = ""

    def open(self, position: int) -> BinaryIO:
        file = open_regular(self.paths[position])
        try:
            check_image_size(os.fstat(file.fileno()).st_size, self.paths[position])
        except OSError:
            file.close()
            raise
        return file

    def name(self, position: int) -> str:
        return self.paths[position]


@dataclass
class ImageSet:
    """Labelled images, stored as files, as members of tar shards, or in memory as uint8 [n, 3, H, W].

    Image i is stored at `positions[i]` in `source`; `labels` is int64 [n].
    """

    classes: list[str]
    labels: np.ndarray
    positions: np.ndarray
    source: Files | TarMembers | Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        position = int(self.positions[index])
        return f"image {position}" if isinstance(self.source, Tensor) else self.source.name(position)

    def read(self, index: int, shape: Callable[[Image.Image], Shaped]) -> Shaped:
        """Return `shape(image)` for one image, which is passed undecoded so that `shape` may decode only a part of it.

        Raises:
            UnreadableImage: the file is missing, is not in one of FORMATS, has more than Image.MAX_IMAGE_PIXELS
                pixels, or cannot be decoded or converted.
        """
        position = int(self.positions[index])
        if isinstance(self.source, Tensor):
            return shape(Image.fromarray(self.source[position].permute(1, 2, 0).numpy()))
        try:
            with self._open_patiently(position) as file, open_image(file, FORMATS) as image:
                most = Image.MAX_IMAGE_PIXELS
                if most is not None and image.width * image.height > most:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels exceed the limit of {most:,} (MAX_IMAGE_PIXELS)"
                    )
                return shape(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders have no common base class: OSError, SyntaxError, ...
            # Without Pillow's file object, and without the errno and path of an OSError.
            reason = getattr(error, "strerror", None) or str(error).partition(" <_io.")[0] or type(error).__name__
            raise UnreadableImage(self.name(index), reason) from error

    def read_bytes(self, index: int) -> bytes:
        """Return the undecoded bytes of one image's file; raise OSError if it cannot be read."""
        with self._open_patiently(int(self.positions[index])) as file:
            return file.read()

    def _open_patiently(self, position: int) -> BinaryIO:
        """Read the whole file into memory, with retries."""
        assert not isinstance(self.source, Tensor)
        # A temporary failure of the disk or network must not lose an image.
        for pause in PAUSES:
            try:
                with self.source.open(position) as file:
                    return io.BytesIO(file.read())
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
                raise
            except OSError:
                time.sleep(pause)
        return self.source.open(position)

    def subset(self, indices: np.ndarray) -> "ImageSet":
        return dataclasses.replace(self, labels=self.labels[indices], positions=self.positions[indices])


def mean_std(config: DataConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Return the per-channel mean and std for values in [0, 1]: the config's or, if null, the data set's defaults."""
    own = DATA_SETS[config.name]
    return config.mean or own.mean, config.std or own.std


def load_image_sets(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return the train and val sets that `config` selects, after hold-out and subsetting.

    Raises:
        ConfigError: a folder is missing, a class is empty, train and val have different or too few classes, or the
            images need `data.value_range`.
    """
    if config.name == "digits":
        train, val = _load_digits()
    elif config.name in ("cifar10", "cifar100") and not (Path(config.root) / "train").is_dir():
        train, val = _load_cifar(config, train=True), _load_cifar(config, train=False)
    else:
        train, val = _load_from_disk(config)
    if config.holdout_fraction > 0:
        train, val = split(train, config.holdout_fraction)
    train = limit(train, config.max_train_images)
    val = limit(val, config.max_val_images)
    _check_classes(config, train.classes)
    for images in (train, val):
        _check_ranges(config, images)
    return train, val


def _check_ranges(config: DataConfig, images: ImageSet) -> None:
    """Raise ConfigError if a few images, evenly spaced, all need `data.value_range`."""
    if isinstance(images.source, Tensor) or config.clip_values:
        return
    reasons = []
    for index in np.linspace(0, len(images) - 1, NUM_LOOKED_AT, dtype=int).tolist():
        try:
            images.read(index, partial(check_range, decoding=decoding_of(config)))
            return
        except UnreadableImage as error:
            if RANGE_REMEDY not in error.reason:
                return
            reasons.append(f"{printable(error.name)}: {error.reason}")
    raise ConfigError(f"data.root={config.root}: none of its images can be read; {reasons[0]}")


def _check_classes(config: DataConfig, classes: list[str]) -> None:
    expected = DATA_SETS[config.name].num_classes
    if expected is None or len(classes) == expected:
        return
    if config.name == "imagenet" and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        print(f"data.root={config.root}: {len(classes)} of ImageNet's {expected:,} classes, a subset")
        return
    raise ConfigError(
        f"data.root={config.root}: {config.name} has {expected} classes, but {len(classes)} are there; use "
        "data=image_folder for a set of your own"
    )


def split(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Return (train, val), where val is a fixed, stratified subset with at least one image per class."""
    held_out = []
    for members in _by_class(images):
        if len(members) < 2:
            raise ConfigError(f"data.holdout_fraction={fraction}: a class with {len(members)} image cannot be split")
        held_out.append(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])
    val = np.sort(np.concatenate(held_out))
    return images.subset(np.setdiff1d(np.arange(len(images)), val)), images.subset(val)


def limit(images: ImageSet, count: int | None) -> ImageSet:
    """Return a fixed, `balanced` subset of `count` images, or all images if there are at most `count`."""
    return images if count is None or count >= len(images) else images.subset(balanced(images, count))


def balanced(images: ImageSet, count: int) -> np.ndarray:
    """Return the indices of a fixed subset, balanced by choosing images round-robin from the classes."""
    rank = np.empty(len(images), dtype=np.int64)
    for members in _by_class(images):
        rank[members] = np.arange(len(members))
    return np.sort(np.lexsort((images.labels, rank))[:count])


def _by_class(images: ImageSet) -> list[np.ndarray]:
    """List the indices of each class's images in a fixed, pseudorandom order."""
    order = fixed_order(len(images))
    return [order[images.labels[order] == label] for label in range(len(images.classes))]


def _load_digits() -> tuple[ImageSet, ImageSet]:
    with resources.files("sasa_train.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(np.int64)
    pixels = torch.from_numpy(np.round(images * (255 / 16)).astype(np.uint8))
    pixels = pixels[:, None].repeat(1, 3, 1, 1)
    return split(ImageSet(list("0123456789"), labels, np.arange(len(labels)), pixels), DIGITS_VAL_FRACTION)


def _load_cifar(config: DataConfig, train: bool) -> ImageSet:
    dataset = tv.CIFAR10 if config.name == "cifar10" else tv.CIFAR100
    try:
        cifar = dataset(config.root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.root={config.root} holds no {config.name}, and the download failed ({error}); fetch it where there "
            "is a network, or give a root with train/ and test/ class folders"
        ) from error
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(list(cifar.classes), np.array(cifar.targets), np.arange(len(pixels)), pixels)


def _load_from_disk(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    root = Path(config.root)
    load = load_shard_set if find_shards(root, "train") else load_class_folders
    train = load(root, "train")
    if config.holdout_fraction > 0:
        return train, train
    val = load(root, "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ConfigError(
            f"data.root={root}: train and val must hold the same classes; only in train: {some(only_train)}; "
            f"only in val: {some(only_val)}"
        )
    return train, val


def load_class_folders(root: Path, split: str) -> ImageSet:
    """Find the images in the class folders of `root/train` (or `root/val` or `root/test`), ordered by path.

    Raises:
        ConfigError: the folder does not exist, or a class has no images.
    """
    folder = root / split
    if split == "val" and not folder.is_dir():
        folder = root / "test"
    if not folder.is_dir():
        raise ConfigError(
            f"data.root={root}: there is no folder {folder}; expected train/ and val/ (or test/) with one folder per "
            "class or tar shards, or train/ alone with data.holdout_fraction"
        )
    try:
        found = tv.ImageFolder(str(folder))
    except FileNotFoundError as error:  # torchvision's message names the empty classes or reports that there are none
        raise ConfigError(f"{folder}: {printable(error)}") from error
    paths, labels = zip(*found.samples, strict=True)
    return ImageSet(
        found.classes, np.array(labels, dtype=np.int64), np.arange(len(labels)), Files(list(paths), str(folder))
    )


def load_shard_set(root: Path, split: str) -> ImageSet:
    """Find the images in a split's tar shards; `root/classes.txt` lists the class names, one per line."""
    shards = find_shards(root, split)
    if not shards:
        raise ConfigError(f"data.root={root}: shards for train, but none for {split}; or use data.holdout_fraction")
    members, labels = load_shards(shards, split)
    names, largest = root / "classes.txt", int(labels.max())
    is_named = os.path.lexists(names)
    if not is_named and largest >= MIN_LABELS + 10 * len(labels):  # otherwise, one wrong label takes gigabytes
        raise ConfigError(
            f"{shards[0].parent}: {len(labels):,} images, but labels up to {largest:,}; mend them, or list all classes "
            f"in {names}"
        )
    classes = _read_classes(names) if is_named else [str(i) for i in range(largest + 1)]
    if largest >= len(classes):
        raise ConfigError(f"{names}: names {len(classes)} classes, but labels go from {labels.min()} to {largest}")
    return ImageSet(classes, labels, np.arange(len(labels)), members)


def _read_classes(path: Path) -> list[str]:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CLASSES_BYTES + 1)
        classes = content.decode().splitlines()
        if len(content) > MAX_CLASSES_BYTES or len(classes) > MAX_CLASSES:
            raise ValueError(f"more than {MAX_CLASSES_BYTES:,} bytes or {MAX_CLASSES:,} lines")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path}: must hold one class name per line, in UTF-8 ({reason}); mend or remove it"
        ) from error
    return classes


def some(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first MAX_NAMES names, escaped, followed by the number of remaining names."""
    rest = len(names) - MAX_NAMES
    return separator.join(map(printable, names[:MAX_NAMES])) + (f" and {rest:,} more" if rest > 0 else "") or "none"
