"""Labelled data sets, on disk or in memory, and fixed, class-balanced subsets of them."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sasa_train.config.derived import one_channel
from sasa_train.config.keys import DATA_SETS, MODES, DataConfig, TrainConfig
from sasa_train.data.class_names import MAX_CLASS_NAME, composed, twins, with_nearest
from sasa_train.data.csv_files import Listed, check_disjoint, check_known, read_list
from sasa_train.data.decoding import RANGE_REMEDY, check_range, decoding_of
from sasa_train.data.hf_sets import HfImages, load_hf
from sasa_train.data.listing import (
    FORMATS,
    LeftOut,
    folders_with_images,
    image_extensions,
    is_hidden_name,
    read_class_folders,
    visible_folders,
)
from sasa_train.data.named_sets import NotDownloadedError, build_named, make
from sasa_train.data.opening import open_image
from sasa_train.data.own_sets import OwnItems, load_own
from sasa_train.data.randomness import fixed_order
from sasa_train.data.shard_index import MAX_CLASSES
from sasa_train.data.shards import (
    SPLIT_NAMES,
    TarMembers,
    check_image_size,
    find_index,
    find_shards,
    load_shards,
    load_url_shards,
)
from sasa_train.data.urls import ServerError, joined, read_file
from sasa_train.data.whole import check_whole
from sasa_train.files import did_you_mean, open_regular
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable, say, some, warn

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_image` rejects such images

PAUSES = (0.1, 1.0)  # seconds to wait before each retry of a failed read
MAX_CLASSES_BYTES = 2**24  # of classes.txt
MAX_NAMED = 5_000  # classes that may be named for any number of images, because a small subset may lack classes
MIN_LABELS = 1000  # smaller labels are accepted from any number of images, without classes.txt
DIGITS_VAL_FRACTION = 0.2
NUM_LOOKED_AT = 5  # images of each split
OBJECTS = ("own", "torchvision", "hf")  # the values of data.name whose images are items of an object
SHARDS, CLASS_FOLDERS = "tar shards", "class folders"
SPLIT_LIKE = r"train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?"
# Folders of a set for segmentation or detection, which are no classes
PART_LIKE = r"images?|imgs?|photos|pictures|(gt_?)?masks?|labels?|annotations?|segmentations?|ground.?truths?|trimaps"
VAL_SPLITS = {None: ("val", "test"), "val": ("val",), "test": ("test",)}  # by data.split; the first that is there

Shaped = TypeVar("Shaped")
Result = TypeVar("Result")


class UnreadableImage(Exception):
    """Raised for a file that is missing, truncated, damaged or not an image; `name` and `reason` describe it."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that a worker process can pickle the exception
        self.name, self.reason = name, reason


@dataclass
class Files:
    """Image files given by their paths; `folder` contains the class folders, or the list at `list_path` names them.

    `left_out` says what is not read, and `doubtful` what is, though it may not be meant; both are for messages.
    """

    paths: list[str]
    folder: str = ""
    left_out: str = ""
    doubtful: tuple[str, ...] = ()
    list_path: str = ""

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
    """Labelled images: files, members of tar shards, items of a data set, or in memory as uint8 [n, 3, H, W].

    Image i is stored at `positions[i]` in `source`; `labels` is int64 [n].
    """

    classes: list[str]
    labels: np.ndarray
    positions: np.ndarray
    source: Files | TarMembers | HfImages | OwnItems | Tensor

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
            ConfigError: the data set that has the item failed, but not as a damaged image does.
            ServerError: the image is behind a URL, and the server failed.
        """
        position = int(self.positions[index])
        if isinstance(self.source, Tensor):
            return shape(Image.fromarray(self.source[position].permute(1, 2, 0).numpy()))
        try:
            if isinstance(self.source, OwnItems):
                return shape(_patiently(partial(self.source.image, position)))
            with self._open_patiently(position) as file:
                return read_image(file, shape)
        except (MemoryError, ConfigError, ServerError):
            raise
        except Exception as error:  # Pillow's decoders have no common base class: OSError, SyntaxError, ...
            raise UnreadableImage(self.name(index), why_unreadable(error)) from error

    def read_bytes(self, index: int) -> bytes:
        """Return the undecoded bytes of one image's file, or an item's pixels; raise OSError if it cannot be read."""
        if isinstance(self.source, OwnItems):
            return _patiently(partial(self.source.pixels, int(self.positions[index])))
        with self._open_patiently(int(self.positions[index])) as file:
            return file.read()

    def _open_patiently(self, position: int) -> BinaryIO:
        """Read the whole file into memory, with retries."""
        source = self.source
        assert isinstance(source, Files | TarMembers | HfImages)

        def read() -> BinaryIO:
            with source.open(position) as file:
                return io.BytesIO(file.read())

        return _patiently(read)

    def subset(self, indices: np.ndarray) -> "ImageSet":
        return dataclasses.replace(self, labels=self.labels[indices], positions=self.positions[indices])


def _patiently(read: Callable[[], Result]) -> Result:
    """Return `read()`, called again after pauses if the disk or network fails, which may be temporary."""
    # A temporary failure must not lose an image.
    for pause in PAUSES:
        try:
            return read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
            raise
        except OSError as error:
            if error.errno is None:  # Pillow's, about the content
                raise
            time.sleep(pause)
    return read()


def read_image(file: BinaryIO, shape: Callable[[Image.Image], Shaped]) -> Shaped:
    """Return `shape(image)` for an image file; raise an error, of any class, if it is damaged or cannot be decoded."""
    with open_image(file, FORMATS) as image:
        shaped = shape(image)
        check_whole(file, image)
        return shaped


def why_unreadable(error: Exception) -> str:
    """Return the reason of an error in reading, without Pillow's file object, or the errno and path of an OSError."""
    text = getattr(error, "strerror", None) or str(error).partition(" <_io.")[0]
    if text == "not enough image data":
        text += ", or, in a compressed BMP, empty rows, which Pillow cannot read; convert it to PNG"
    return text or f"its content is damaged; {type(error).__name__} in its decoder"


def mean_std(config: DataConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Return the per-channel mean and std for values in [0, 1]: the config's or, if null, the data set's defaults."""
    own, is_grey = DATA_SETS[config.name], MODES[config.mode] == 1
    mean, std = ([one_channel(own.mean)], [one_channel(own.std)]) if is_grey else (own.mean, own.std)
    return config.mean or mean, config.std or std


def load_image_sets(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return the train and val sets that `config` selects, after hold-out and subsetting.

    Raises:
        ConfigError: a folder is missing, a class of train is empty, val has no images or a class that train lacks, or
            the images need `data.value_range`.
    """
    if config.name == "digits":
        train, val = _load_digits()
    elif config.name in OBJECTS:
        train, val = _load_own(config)
    elif config.name == "list":
        train, val = _load_lists(config)
    elif reads_torchvision(config):
        _check_torchvision_split(config)
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
    raise ConfigError(f"{config.place}: none of its images can be read; {reasons[0]}")


def load_val_set(config: DataConfig, classes: Sequence[str]) -> ImageSet:
    """Return the val set that `config` selects for a trained model, labelled by position in its `classes`.

    Train is read only for a hold-out. If `data.root` has no val/ or test/, its own folders are taken as the classes.

    Raises:
        ConfigError: a folder is missing, there are no images, or a class is not one of `classes`.
    """
    root = _root_of(config)
    is_held_out = config.name in (*OBJECTS, "list") and config.holdout_fraction > 0
    if config.name == "digits" or is_held_out or reads_torchvision(config, classes):
        return relabelled(load_image_sets(config)[1], classes, config.name, "the checkpoint", "it")
    if config.name in OBJECTS:
        val, name = _own_image_sets(config, "val")[0], "val"
    elif config.name == "list":
        val, name = _told(_listed_set(_read_list(config, "val", classes, "the checkpoint"))), "val"
    elif config.holdout_fraction > 0 and (isinstance(root, str) or root.is_dir()):
        if isinstance(root, Path) and not _may_have_train(root):
            raise ConfigError(
                f"data.holdout_fraction={config.holdout_fraction}: val is a part of {root / 'train'}, which is not "
                "there; to evaluate val/, test/ or class folders, add data.holdout_fraction=0"
            )
        val, name = load_image_sets(config)[1], "train"
    elif config.split is None and isinstance(root, Path) and _holds_classes(root, classes):
        val, name = _told(_image_set(root)), "its folders (there is no val/ or test/)"
    else:
        val, name = _load_val(root, config.split)
    val = limit(relabelled(val, classes, config.place, "the checkpoint", name), config.max_val_images)
    _check_ranges(config, val)
    return val


def _may_have_train(root: Path) -> bool:
    return (root / "train").is_dir() or bool(find_shards(root, "train")) or holds_class_folders(root)


def reads_torchvision(config: DataConfig, classes: Sequence[str] = ()) -> bool:
    """Whether the set is CIFAR in torchvision's files: `data.root` has no train/ and, if given, none of `classes`."""
    names = ("train", *VAL_SPLITS[None], *classes) if classes else ("train",)
    return config.name in ("cifar10", "cifar100") and not any((Path(config.folder) / name).is_dir() for name in names)


def check_whole_set(config: DataConfig, classes: Sequence[str] = ()) -> None:
    """Raise ConfigError if the set is torchvision's and not whole in `data.root`, so that it would be downloaded.

    classes: as in `reads_torchvision`.
    """
    try:
        if config.name == "torchvision":
            build_named(config, download=False)
        elif reads_torchvision(config, classes):
            make(config.name.upper(), root=config.folder, train=False, download=False)
    except NotDownloadedError as error:
        raise ConfigError(
            f"data.root={config.root} holds no whole {config.dataset or config.name}; say where with data.root=..."
        ) from error


def _check_torchvision_split(config: DataConfig) -> None:
    if config.split == "val":
        raise ConfigError(f"data.split=val: torchvision's {config.name} has train and test alone; use data.split=test")


def _holds_classes(root: Path, classes: Sequence[str]) -> bool:
    """Whether `root` has class folders instead of splits; a class may be named train or test."""
    names = visible_folders(root) if root.is_dir() else []
    splits = {"train", *VAL_SPLITS[None]}.intersection(names)
    return bool(names) and not any(name not in classes or visible_folders(root / name) for name in splits)


def relabelled(images: ImageSet, classes: Sequence[str], where: str, whose: str, name: str) -> ImageSet:
    """Return `images` with labels that are positions in `classes`; a warning names classes without images.

    where, whose, name: the place of the images, the owner of `classes` and the name of the images, for messages.

    Raises:
        ConfigError: a class of `images` is not in `classes`, or there are no images.
    """
    names, known = composed(images.classes), composed(classes)
    if unknown := sorted(set(names) - set(known)):
        missing = sorted(set(known) - set(names))
        raise ConfigError(
            f"{where}: {whose} and {name} must hold the same classes; only in {whose}: {some(missing)}; only in "
            f"{name}: {', '.join(with_nearest(one, missing or known) for one in unknown[:5])}"
            + (f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else "")
        )
    labels, order = images.labels, np.arange(len(images))
    if names != known:
        if same := twins(classes):
            raise ConfigError(f"{where}: {whose} and {name} cannot be matched by name: {whose} has {some(same)}")
        number = {one: label for label, one in enumerate(known)}
        labels = np.array([number[one] for one in names], dtype=np.int64)[labels]
        order = np.argsort(labels, kind="stable")
    if not len(labels):
        raise ConfigError(f"{where}: no image of any class in {name}; give a folder with images")
    if len(empty := np.flatnonzero(np.bincount(labels, minlength=len(known)) == 0)):
        what = some([classes[label] for label in empty.tolist()])
        warn(f"{where}: no image of {what} in {name}; averages over classes leave such a class out")
    return dataclasses.replace(images, classes=list(classes), labels=labels[order], positions=images.positions[order])


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
    held_out, of_class = [], _by_class(images)
    if few := [name for name, members in zip(images.classes, of_class, strict=True) if len(members) < 2]:
        raise ConfigError(
            f"data.holdout_fraction={fraction}: must leave an image of each class in train and in val, but fewer than "
            f"2 images are of {some(few)}; add images, or remove what cannot be split"
        )
    for members in of_class:
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
    hint = ", or give a root with train/ and test/ class folders"
    cifar = make(config.name.upper(), hint, root=config.folder, train=train, download=True)
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(list(cifar.classes), np.array(cifar.targets), np.arange(len(pixels)), pixels)


def _load_own(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    if config.holdout_fraction > 0:
        train = _checked_own(config, *_own_image_sets(config, "train"))
        return train, train
    train, val = _own_image_sets(config, "train", "val")
    return _checked_own(config, train), relabelled(val, train.classes, config.place, "train", "val")


def _checked_own(config: DataConfig, train: ImageSet) -> ImageSet:
    check_several(train)
    _check_named(config.place, train.classes, len(train))
    return relabelled(train, train.classes, config.place, "classes", "train")  # warns of empty classes


def _own_image_sets(config: DataConfig, *splits: str) -> list[ImageSet]:
    """Return the sets that are objects for `splits`, labelled by each set's own classes."""
    if config.name == "hf":
        loaded = load_hf(config, splits)
        return [ImageSet(classes, labels, np.arange(len(labels)), images) for classes, labels, images in loaded]
    found = load_own(config, splits)
    return [ImageSet(classes, items.labels, np.arange(len(items.labels)), items) for classes, items in found]


def _load_lists(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    if config.holdout_fraction > 0:
        return (train := load_train(config)), train
    if config.val is None:
        raise ConfigError("data.val=null must name a list, or set data.holdout_fraction, which takes val from train")
    lists = read_lists(config)
    train = _checked_list(config, lists["train"])
    return train, relabelled(_told(_listed_set(lists["val"])), train.classes, config.place, "train", "val")


def read_lists(config: DataConfig) -> dict[str, Listed]:
    """Return the lists of train and, if it is named, val, which must have no image in common.

    Raises:
        ConfigError: a list is not valid, or they have images in common.
    """
    lists = {"train": _read_list(config, "train")}
    if config.val is not None:
        lists["val"] = _read_list(config, "val", list(lists["train"].classes), f"data.train={config.train}")
        check_disjoint(lists["train"], lists["val"])
    return lists


def _checked_list(config: DataConfig, listed: Listed) -> ImageSet:
    train = _told(_listed_set(listed))
    check_all_there(listed.what, train, "mend the list")
    check_several(train)
    _check_named(config.place, train.classes, len(train))
    return train


def _read_list(config: DataConfig, split: str, classes: Sequence[str] | None = None, whose: str = "") -> Listed:
    """Read the list of a split; its labels must be among `classes`, if they are given, which are `whose`.

    Raises:
        ConfigError: no list is named, or it is not valid (see `read_list`).
    """
    path = config.train if split == "train" else config.val
    if path is None:
        raise ConfigError(f"data.{split}=null must name the CSV file of {split}")
    listed = read_list(path, printable(f"data.{split}={path}"), config.columns, config.root)
    if same := twins(list(listed.classes)):
        raise ConfigError(f"{listed.what}: has labels that are the same in different Unicode forms: {some(same)}")
    if classes is not None:
        check_known(listed, classes, whose)
    return listed


def _listed_set(listed: Listed) -> ImageSet:
    return labelled(listed.classes, left_out=listed.left_out.describe(), list_path=listed.path)


def _load_from_disk(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    root = _root_of(config)
    train = load_train(config)
    _tell_left_out(train)
    check_several(train)
    train = relabelled(train, train.classes, f"data.root={root}", "classes.txt", "train")  # warns of empty classes
    if config.holdout_fraction > 0:
        if isinstance(root, Path):
            _tell_beside(root)
        return train, train
    val, name = _load_val(root, config.split)
    return train, relabelled(val, train.classes, f"data.root={root}", "train", name)


def _root_of(config: DataConfig) -> Path | str:
    """Return `data.root` as a path or, if it is a URL, as a text."""
    return config.folder if config.is_remote else Path(config.folder)


def load_train(config: DataConfig) -> ImageSet:
    """Return the images of train before the hold-out; a hold-out may be taken from class folders in the root itself.

    Raises:
        ConfigError: a folder is missing, or a class has no images.
    """
    if config.name in OBJECTS:
        return _checked_own(config, *_own_image_sets(config, "train"))
    if config.name == "list":
        return _checked_list(config, _read_list(config, "train"))
    root = _root_of(config)
    if isinstance(root, str) or find_shards(root, "train"):
        return load_shard_set(root, "train")
    return load_class_folders(root, "" if config.holdout_fraction > 0 and holds_class_folders(root) else "train")


def split_folders(root: Path) -> list[str]:
    """Return which of train, val and test are folders of class folders; none of them if they are classes themselves."""
    names = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    # A class may be named train or test, so a single such folder without subfolders is treated as a class.
    return names if len(names) > 1 or any(visible_folders(root / name) for name in names) else []


def holds_class_folders(root: Path) -> bool:
    """Whether the folders in `root`, if there are any, are classes rather than splits, and there are no tar shards."""
    return root.is_dir() and not split_folders(root) and not holds_shards(root)


def check_output_dir(config: TrainConfig) -> None:
    """Raise ConfigError if runs would be written among the class folders of `data.root`, as a class of their own."""
    root, place = Path(config.data.folder), Path(config.output_dir).resolve()
    is_there = root.resolve() in (place, place.parent) and not is_hidden_name(place.name)
    if config.data.name != "image_folder" or not is_there or not holds_class_folders(root):
        return
    others = [root / name for name in visible_folders(root) if (root / name).resolve() != place]
    if not others or not all(map(_has_image_names, others)):
        return
    remedy = _pasted("output_dir", os.path.relpath(root.resolve().parent / "outputs"))
    raise ConfigError(
        f"output_dir={printable(config.output_dir)}: runs would lie among the class folders of "
        f"data.root={printable(root)} and be a class themselves; add {remedy}"
    )


def remote_val(root: str, split: str | None) -> str | None:
    """Return the name of the split behind a URL that `data.split` selects, or None if it is not there."""
    return next((name for name in VAL_SPLITS[split] if find_index(root, name)), None)


def _load_val(root: Path | str, split: str | None) -> tuple[ImageSet, str]:
    """Return the images of the split that `data.split` selects, and its name."""
    if isinstance(root, str):
        name = remote_val(root, split) or VAL_SPLITS[split][-1]
        return load_shard_set(root, name), name
    are_shards = holds_shards(root)
    kinds = {name: kind for name in VAL_SPLITS[split] if (kind := kind_of(root, name))}
    if are_shards and not kinds:
        wanted = " or ".join(VAL_SPLITS[split])
        raise ConfigError(f"data.root={root}: shards for train, but none for {wanted}; or use data.holdout_fraction")
    name = next(iter(kinds), VAL_SPLITS[split][-1])
    if kinds and (of_train := kind_of(root, "train")) not in (None, kinds[name]):
        raise ConfigError(f"data.root={root}: {unlike(name, kinds[name], str(of_train))}")
    are_shards = kinds.get(name) == SHARDS
    _tell_beside(root)
    return _told(load_shard_set(root, name) if are_shards else load_class_folders(root, name)), name


def beside_splits(root: Path) -> list[str]:
    """Return the folders of images beside train/, val/ or test/, such as validation/; [] if there are no such splits.

    Raises:
        ConfigError: a folder cannot be listed.
    """
    if not root.is_dir() or not split_folders(root):
        return []
    try:
        return [name for name in folders_with_images(root) if name not in SPLIT_NAMES]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def images_beside_splits(root: Path) -> list[str]:
    """Return the names of images and tar files in `root`, beside train/, val/ or test/; [] if it has no splits."""
    names = sorted(os.listdir(root)) if root.is_dir() and split_folders(root) else []
    return [name for name in names if (_is_image_name(name) or name.endswith(".tar")) and (root / name).is_file()]


def _tell_beside(root: Path) -> None:
    if others := beside_splits(root) + images_beside_splits(root):
        say(f"{printable(root)}: left out, beside train/, val/ and test/: {some(others)}", sys.stderr)


def kind_of(root: Path, split: str) -> str | None:
    """Return whether a split consists of SHARDS or CLASS_FOLDERS, or None if it is not there."""
    return SHARDS if find_shards(root, split) else CLASS_FOLDERS if (root / split).is_dir() else None


def unlike(split: str, kind: str, other: str) -> str:
    """Say that a split is not of the kind of the other splits, with the remedy."""
    return f"{split} consists of {kind}, but the rest of {other}; make all of one kind (sasa-data shard makes shards)"


def holds_shards(root: Path) -> bool:
    """Whether a data set consists of tar shards; if train is missing, val or test decides."""
    if (root / "train").is_dir() or find_shards(root, "train"):
        return bool(find_shards(root, "train"))
    return any(find_shards(root, split) for split in SPLIT_NAMES)


def has_train(config: DataConfig) -> bool:
    """Whether the images to train on are there; those of torchvision's CIFAR may be downloaded."""
    if config.name == "list":
        return config.train is not None and os.path.isfile(config.train)
    root = Path(config.folder)
    is_known = config.name in ("digits", *OBJECTS) or config.is_remote or reads_torchvision(config)
    is_in_root = config.holdout_fraction > 0 and holds_class_folders(root) and bool(visible_folders(root))
    return is_known or is_in_root or (root / "train").is_dir() or holds_shards(root)


def _tell_left_out(images: ImageSet) -> None:
    """Print a line about the files in their folders that are not read, if there are any."""
    if isinstance(images.source, Files) and images.source.left_out:
        where = images.source.list_path or images.source.folder
        say(f"{printable(where)}: left out, {images.source.left_out}", sys.stderr)


def _told(images: ImageSet) -> ImageSet:
    """Return the images after saying what is not read, and what is read that may not be meant."""
    _tell_left_out(images)
    if isinstance(images.source, Files):
        for doubtful in images.source.doubtful:
            warn(f"{printable(images.source.folder)}: {doubtful}")
    return images


def check_several(train: ImageSet) -> None:
    """Raise ConfigError if all images to train on are of one class; the message names it and a likely reason."""
    if len(train.classes) == 1:
        folder = train.source.folder if isinstance(train.source, Files) else ""
        where = train.source.what if isinstance(train.source, OwnItems | HfImages) else folder
        where = where or (train.source.list_path if isinstance(train.source, Files) else "") or "train"
        names = [train.name(i) for i in range(len(train))]
        raise ConfigError(f"{printable(where)}: {only_class(train.classes[0], folder, names)}")


def only_class(name: str, folder: str, paths: Sequence[str]) -> str:
    """Describe a set's only class, of images at `paths`; if its folder in `folder` holds folders, suggest these."""
    top = os.path.join(folder, name)
    within = [path.removeprefix(f"{top}/") for path in paths if path.startswith(f"{top}/")]
    inner = sorted({path.partition("/")[0] for path in within if "/" in path})
    text = f"{printable(name)} is the only class, but at least two are needed"
    if not inner:
        return f"{text}; add a folder of images for each other class" if folder else f"{text}; mend the labels"
    if not {"train", *VAL_SPLITS[None]}.isdisjoint(inner):
        return f"{text}; its folders ({some(inner)}) look like splits: give {printable(top)} as the root"
    text += f"; its folders with images ({some(inner)}) look like the classes: "
    if os.path.basename(folder) in SPLIT_NAMES:  # val has such a folder, too
        return f"{text}move them up into {printable(folder)}"
    return f"{text}give the folder that holds them, {_pasted('data.root', likely_root(folder, paths) or top)}"


def check_level(root: Path, train: ImageSet, fraction: float) -> None:
    """Raise ConfigError if a class folder in `root` holds no image itself, but several folders of them.

    fraction: the hold-out; a user who sets it says that the folders in `root` are the classes.
    """
    assert isinstance(train.source, Files)
    with_images = {name: set[str]() for name in train.classes}
    for folder in set(map(os.path.dirname, train.source.paths)):
        with_images[os.path.relpath(folder, root).split(os.sep)[0]].add(folder)
    within = {name: _inner_folders(folders) for name, folders in with_images.items()}
    if not (above := [name for name, inner in within.items() if len(inner) > 1]):
        return
    likely = likely_root(str(root), train.source.paths) or str(root)
    first = os.path.relpath(likely, root).split(os.sep)[0]
    name = first if first in above else max(above, key=lambda name: len(within[name]))
    remedy = f"if these are the classes, give the folder that holds them: {_pasted('data.root', likely)}"
    if likely == str(root):
        remedy = f"if {'they are' if len(above) > 1 else 'it is'} not of the set, move {some(above)} elsewhere"
    elif len(above) == len(within) and len(same := set.intersection(*within.values())) > 1:
        remedy = f"if they are splits of the same classes ({some(sorted(same))}), make them train/ and val/ of a folder"
    elif likely != str(root / name):
        remedy = f"if the classes are in {printable(likely)}, give that folder: {_pasted('data.root', likely)}"
    raise ConfigError(
        f"data.root={printable(root)}: its folder {printable(name)} would be one class, but holds only further folders "
        f"of images ({some(sorted(within[name]))}); {remedy}; if each folder in {printable(root)} is a class with all "
        f"images below it, add data.holdout_fraction={fraction}"
    )


def _inner_folders(folders: set[str]) -> set[str]:
    """Return the names of the folders in the one that holds all `folders`; none, if that is one of them."""
    common = os.path.commonpath(folders)
    return set() if common in folders else {os.path.relpath(folder, common).split(os.sep)[0] for folder in folders}


def _pasted(key: str, path: str) -> str:
    from sasa_train.config.overrides import pasted  # which imports Hydra, as loading a model must not

    return pasted(key, path)


def likely_root(top: str, paths: Sequence[str]) -> str:
    """Return the folder at or below `top` that holds most folders of images, as a root does; "" if none has several.

    Folders of a single image, such as the folders of runs, count only if there are no others.
    """
    folders = dict[str, list[int]]()
    for folder, count in Counter(os.path.dirname(path) for path in paths).items():
        folders.setdefault(os.path.dirname(folder), []).append(count)
    several = sorted(folder for folder, counts in folders.items() if len(counts) > 1)
    ranks = {folder: (sum(n > 1 for n in folders[folder]), len(folders[folder])) for folder in several}
    best = max(several, key=lambda folder: (*ranks[folder], -folder.count(os.sep)), default="")
    best = os.path.dirname(best) if os.path.basename(best) in SPLIT_NAMES and best != top else best
    return str(Path(best)) if best else ""  # x instead of ./x


def load_class_folders(root: Path, split: str) -> ImageSet:
    """Find the images in the class folders of `root/train`, `root/val`, `root/test` or `root` itself, ordered by path.

    split: train, val, test, or "" for the class folders in `root`, which are those of train.

    Raises:
        ConfigError: the folder does not exist, two classes have the same name, or a class of train has no images.
    """
    folder = root / split
    if not folder.is_dir():
        missing = folder if root.is_dir() else root
        raise ConfigError(
            f"data.root={root}: there is no folder {missing}{did_you_mean(missing)}; expected train/ and val/ (or "
            "test/) with one folder per class or tar shards, or train/ or the class folders alone with "
            "data.holdout_fraction"
        )
    images = _image_set(folder, may_be_splits=split == "")
    if split in ("train", ""):
        remedy = "add images, or remove the folders"
        if split == "" and len(np.unique(images.labels)) < len(images.classes):
            likely = likely_root(str(folder), [images.name(i) for i in range(len(images))])
            if likely not in ("", str(folder)):
                given = _pasted("data.root", likely)
                remedy = f"if the classes are in {printable(likely)}, give that folder: {given}; otherwise, {remedy}"
        check_all_there(folder, images, remedy)
    return images


def check_all_there(where: Path | str, images: ImageSet, remedy: str) -> None:
    """Raise ConfigError if a class has no image."""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if not counts.all():
        names = some([images.classes[label] for label in np.flatnonzero(counts == 0).tolist()])
        left_out = images.source.left_out if isinstance(images.source, Files) else ""
        beside = f" (left out, {left_out})" if left_out else ""
        raise ConfigError(f"{where}: no image of the classes {names}{beside}; {remedy}")


def listed_folders(folder: Path) -> tuple[dict[str, list[str]], LeftOut]:
    """Call `read_class_folders`; raise ConfigError if a folder cannot be listed."""
    try:
        return read_class_folders(str(folder))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _image_set(folder: Path, may_be_splits: bool = False) -> ImageSet:
    found, left_out = listed_folders(folder)
    if not found:
        beside = f" (found {some([os.path.basename(path) for path in left_out.outside])})" if left_out.outside else ""
        above = _about_parent(folder) if left_out.outside else ""
        raise ConfigError(f"{folder}: holds no class folder{beside}; expected one folder of images per class{above}")
    if same := twins(list(found)):
        raise ConfigError(
            f"{folder}: has folders of the same name in different Unicode forms: {some(same)}; merge them"
        )
    if may_be_splits:
        refuse_splits(folder, left_out)
    top = str(folder)
    doubtful = tuple(doubts_about(list(found), left_out, folder, folder))
    return labelled(found, folder=top, left_out=left_out.describe(top), doubtful=doubtful)


def doubts_about(classes: list[str], left_out: LeftOut, folder: Path, top: Path) -> list[str]:
    """Name what is read from the class folders in `folder`, though perhaps not meant, in paths relative to `top`."""
    found = left_out.describe_doubtful(str(top), str(folder))
    if classes and all(re.fullmatch(PART_LIKE, name, re.IGNORECASE) for name in classes):
        found.append(f"{some(classes)} are read as classes, but named as the parts of one data set")
    return found


def labelled(found: Mapping[str, list[str]], **about: Any) -> ImageSet:
    """Return the images of each class, by its name, as a set; `about` are the other fields of `Files`."""
    paths = [path for of_class in found.values() for path in of_class]
    labels = np.repeat(np.arange(len(found)), [len(of_class) for of_class in found.values()])
    return ImageSet(list(found), labels.astype(np.int64), np.arange(len(paths)), Files(paths, **about))


def refuse_splits(root: Path, left_out: LeftOut) -> None:
    """Raise ConfigError if class folders in `root` hold folders of images, and are named as splits often are."""
    within = [os.path.relpath(path, root).split(os.sep) for path in left_out.inner]
    if names := sorted({parts[0] for parts in within if re.fullmatch(SPLIT_LIKE, parts[0], re.IGNORECASE)}):
        inner = sorted({parts[1] for parts in within if parts[0] == names[0]})
        raise ConfigError(
            f"{root}: {some(names)} would be a class, but holds folders of images ({some(inner)}) as splits do; name "
            "splits train/ and val/ or test/, or move the images of a class into its folder itself"
        )


def _about_parent(folder: Path) -> str:
    """Suggest the folder above `folder`, which holds images, if it looks like one class of several."""
    top = folder.parent if folder.name not in ("", "..") else Path(os.path.abspath(folder)).parent
    with contextlib.suppress(OSError):
        classes = [name for name in visible_folders(top) if _has_image_names(top / name)]
        if folder.name not in SPLIT_NAMES and len(classes) > 1:
            return (
                f"; if it is one class, take the folder above it, which has {len(classes)}: "
                f"{_pasted('data.root', str(top))}; to classify its images by a trained model: sasa-predict RUN FOLDER"
            )
    return ""


def _has_image_names(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image_name(entry.name) for entry in entries)


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions() and not name.startswith(".")


def load_shard_set(root: Path | str, split: str, left_out: LeftOut | None = None) -> ImageSet:
    """Find the images in a split's tar shards; `root/classes.txt` lists the class names, one per line.

    root: a folder, or a URL as a text.
    left_out: see `load_shards`.
    """
    names: Path | str
    if isinstance(root, str):
        where, names = root, joined(root, "classes.txt")
        members, labels = load_url_shards(root, split)
        content = read_file(names, MAX_CLASSES_BYTES)
    else:
        shards, names = find_shards(root, split), root / "classes.txt"
        where, (members, labels) = str(shards[0].parent), load_shards(shards, split, left_out)
        content = _read_names(names) if os.path.lexists(names) else None
    largest = int(labels.max())
    if content is None and largest >= MIN_LABELS + 10 * len(labels):  # otherwise, one wrong label takes gigabytes
        raise ConfigError(
            f"{where}: {len(labels):,} images, but labels up to {largest:,}; mend them, or list all classes in {names}"
        )
    classes = _parse_classes(names, content) if content is not None else [str(i) for i in range(largest + 1)]
    if largest >= len(classes):
        raise ConfigError(f"{names}: names {len(classes)} classes, but labels go from {labels.min()} to {largest}")
    if split == "train":
        _check_named(names, classes, len(labels))
    return ImageSet(classes, labels, np.arange(len(labels)), members)


def _check_named(path: Path | str, classes: list[str], num_images: int) -> None:
    """Raise ConfigError if there are absurdly many classes, and print a line if two have the same name."""
    # An evaluation counts 8 bytes per pair of classes: 200 MB for 5,000 of them, but 8 TB for a million.
    if len(classes) > MAX_NAMED + 10 * num_images:
        raise ConfigError(
            f"{path}: names {len(classes):,} classes, but train has {num_images:,} images; list the classes of the "
            "images alone"
        )
    if same := [name for name, count in Counter(classes).items() if count > 1]:
        say(f"{path}: more than one class is named {some(same)}; they remain different classes", sys.stderr)


def _read_names(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(MAX_CLASSES_BYTES + 1)
    except OSError as error:
        raise ConfigError(_wrong_names(path, error.strerror or error)) from error


def _parse_classes(path: Path | str, content: bytes) -> list[str]:
    """Return the classes that classes.txt at `path` lists; raise ConfigError if it is not valid."""
    try:
        # Not splitlines(), which also splits at characters that names may have.
        classes = [name.removesuffix("\r") for name in content.decode("utf-8-sig").removesuffix("\n").split("\n")]
        if len(content) > MAX_CLASSES_BYTES or len(classes) > MAX_CLASSES:
            raise ValueError(f"more than {MAX_CLASSES_BYTES:,} bytes or {MAX_CLASSES:,} lines")
        if (longest := max(map(len, classes))) > MAX_CLASS_NAME:
            raise ValueError(f"a name of {longest:,} characters; {MAX_CLASS_NAME:,} are the most")
        if "\0" in "".join(classes):
            raise ValueError("a name with the character NUL")
        if (empty := next((n for n, name in enumerate(classes, 1) if not name.strip()), None)) is not None:
            raise ValueError(f"line {empty:,} is empty")
    except ValueError as error:
        raise ConfigError(_wrong_names(path, error)) from error
    return classes


def _wrong_names(path: Path | str, reason: object) -> str:
    return f"{path}: must hold one class name per line, in UTF-8 ({reason}); mend or remove it"
