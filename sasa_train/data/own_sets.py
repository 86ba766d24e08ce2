"""Data sets as objects, the user's own (`data.target`) and torchvision's: their labels, and images from their items.

A set is read as files are: on demand, in any process and order. So an item must be the same whenever it is read.
"""

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from sasa_train.config import own_code
from sasa_train.config.keys import DataConfig
from sasa_train.data.class_names import MAX_CLASS_NAME
from sasa_train.data.named_sets import build_named
from sasa_train.data.randomness import own_code_rng
from sasa_train.processes.ranks import rank
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable, progress_bar

NUM_READ_TWICE = 8  # items of each set, when it is loaded
KINDS = "a PIL image, a uint8 array [H, W] or [H, W, 3], or a uint8 tensor [H, W] or [3, H, W] as torchvision's"


@dataclass
class OwnItems:
    """The items of a map-style data set, each an image and its label.

    `labels` is int64 [n]; `what` names the key and the split; `paths`, if the set has them, are the images' files.
    """

    items: Any
    labels: np.ndarray
    what: str
    paths: list[str] | None = None

    def name(self, position: int) -> str:
        return f"image {position}" if self.paths is None else self.paths[position]

    def image(self, position: int, reading: int = 0) -> Image.Image:
        """Read an image; numbers from global generators depend on `position` and `reading` alone.

        Raises:
            OSError: the user's code raised what Pillow raises for a damaged image.
            ConfigError: the item is not valid, has another label than before, or the user's code failed otherwise.
        """
        image, label = read_item(self.items, position, self.what, reading)
        if label != self.labels[position]:
            raise ConfigError(
                f"{self.what}, item {position}: its label is {label}, but was {self.labels[position]} in the set's "
                "targets or when it was read before; a label must not change (del dataset.targets makes its items "
                "count, as after a target_transform)"
            )
        return as_image(image, f"{self.what}, item {position}")

    def pixels(self, position: int, reading: int = 0) -> bytes:
        """Return the mode, size and pixels of an image; raise OSError if it cannot be read."""
        image = self.image(position, reading)
        try:
            image = image.convert("RGBA") if image.mode in ("P", "PA") else image  # otherwise the palette is left out
            return f"{image.mode} {image.size} ".encode() + image.tobytes()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders have no common base class
            raise OSError(str(error)) from error


def load_own(config: DataConfig, splits: Sequence[str]) -> list[tuple[list[str], OwnItems]]:
    """Return the classes and items of `splits`, which name train, val or both, of the user's or torchvision's sets.

    Raises:
        ConfigError: the sets cannot be made, or one is not valid; see docs/own_code.md.
    """
    build = build_own if config.target is not None else build_named
    sets, where = dict(zip(("train", "val"), build(config), strict=True)), f"{config.place}: train"
    _check_kind(sets["train"], where)
    if config.dataset is not None and _classes(sets["train"]) is None:  # such as SVHN: its classes are numbers
        sets["train"].targets = _read_set(sets["train"], where).labels
        sets["train"].classes = [str(label) for label in range(int(max(sets["train"].targets)) + 1)]
    classes, loaded = _classes(sets["train"]), []
    _check_classes(classes, where)
    for split in splits:
        items, what = sets[split], f"{config.place}: {split}"
        if items is None and split == "val":
            remedy = "return a data set, or " if config.target is not None else ""
            raise ConfigError(f"{what} is None; {remedy}set data.holdout_fraction, which takes it from train")
        own = _read_set(items, what)
        of_split = _classes(items) or classes
        _check_classes(of_split, what)
        if not 0 <= own.labels.min() <= own.labels.max() < len(of_split):
            wrong = int(np.flatnonzero((own.labels < 0) | (own.labels >= len(of_split)))[0])
            raise ConfigError(
                f"{what}, item {wrong}: its label is {own.labels[wrong]}, but must be from 0 to {len(of_split) - 1}, "
                f"the position of its class among the {len(of_split)} classes"
            )
        _check_repeatable(own)
        loaded.append((list(of_split), own))
    return loaded


def build_own(config: DataConfig) -> tuple[Any, Any]:
    """Call the user's function and return what it calls train and val."""
    make = own_code.load("data.target", str(config.target))
    # random_split, for example, draws from the global generator; the sets must not depend on its state.
    with own_code.errors_of(config.place), own_code_rng(0, 0, 0):
        found = make(**config.args)
    if not isinstance(found, tuple | list) or len(found) != 2:
        shown = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        raise ConfigError(
            f"{config.place} ({own_code.place_of(make)}): must return two data sets, (train, val), but returned {shown}"
        )
    return found[0], found[1]


def read_item(items: Any, position: int, what: str, reading: int = 0) -> tuple[Any, int]:
    """Return an item's image, not checked, and its label; the errors are those of `OwnItems.image`."""
    where = f"{what}, item {position}"
    try:
        with own_code_rng(0, reading, position):
            item = items[position]
    except (MemoryError, OSError):
        raise
    except Exception as error:
        # Pillow's, for too many pixels, and for broken PNG files.
        if isinstance(error, Image.DecompressionBombError) or (isinstance(error, SyntaxError) and not error.filename):
            raise OSError(str(error)) from error
        own_code.refuse(where, error)
    if not isinstance(item, tuple | list) or len(item) != 2:
        shown = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
        raise ConfigError(f"{where}: must be two values, (image, label), but is {shown}")
    try:
        return item[0], operator.index(item[1])
    except TypeError as error:
        raise ConfigError(
            f"{where}: its label must be an int, the position of its class, but is {type(item[1]).__name__} "
            f"({printable(shorten(item[1]))})"
        ) from error


def as_image(value: Any, where: str) -> Image.Image:
    """Return an item's image as a PIL image.

    Raises:
        OSError: a JPEG that was opened but not decoded is damaged.
        ConfigError: it is none of KINDS.
    """
    if isinstance(value, Image.Image):
        if value.format in ("JPEG", "MPO"):
            value.load()  # otherwise a crop would decode it at a smaller size, and so would a set that keeps it
        return value
    if not isinstance(value, np.ndarray | Tensor):
        raise ConfigError(f"{where}: its image must be {KINDS}, but is {type(value).__name__}")
    is_tensor = isinstance(value, Tensor)
    shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
    channels = shape[0 if is_tensor else 2] if len(shape) == 3 else 1
    if dtype != "uint8" or len(shape) not in (2, 3) or channels not in (1, 3) or 0 in shape:
        remedy = "leave out ToTensor, ToDtype and Normalize: training normalises" if dtype != "uint8" else "convert it"
        kind = "tensor" if is_tensor else "array"
        raise ConfigError(f"{where}: its image must be {KINDS}, but is a {dtype} {kind} {shape}; {remedy}")
    array = value.cpu().numpy() if isinstance(value, Tensor) else value
    if array.ndim == 3:
        array = array.transpose(1, 2, 0) if is_tensor else array
        array = array[:, :, 0] if channels == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def _check_kind(items: Any, what: str) -> None:
    is_map = all(hasattr(items, name) for name in ("__getitem__", "__len__"))
    if not is_map or isinstance(items, IterableDataset | str | bytes | dict):
        raise ConfigError(
            f"{what} must be a map-style data set, with len(s) and s[i] -> (image, label), but is a "
            f"{type(items).__name__}"
        )


def _read_set(items: Any, what: str) -> OwnItems:
    """Return a data set's items with their labels."""
    _check_kind(items, what)
    with own_code.errors_of(what):
        length = len(items)
    if length == 0:
        raise ConfigError(f"{what} has no images: len() is 0")
    with own_code.errors_of(what):
        samples = _listed(items, "samples")
        samples = _listed(items, "imgs") if samples is None else samples
        targets = _listed(items, "targets")
    labels = _read_labels(items, length, what) if targets is None else _checked(targets, length, what)
    return OwnItems(items, labels, what, _paths(samples, length))


def _listed(items: Any, name: str) -> Any:
    """Return what a data set lists under `name`, one entry per item, as torchvision's do; None if it does not."""
    if not isinstance(items, Subset):
        return getattr(items, name, None)
    of_all = _listed(items.dataset, name)
    return None if of_all is None else [of_all[i] for i in items.indices]


def _paths(samples: Any, length: int) -> list[str] | None:
    """Return the paths in torchvision's lists of (path, label)."""
    is_list = isinstance(samples, list | tuple) and len(samples) == length
    paths = [sample[0] for sample in samples if isinstance(sample, list | tuple) and sample] if is_list else []
    return paths if len(paths) == length and all(isinstance(path, str) for path in paths) else None


def _checked(targets: Any, length: int, what: str) -> np.ndarray:
    labels = np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets)
    if labels.shape != (length,) or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"{what}: its targets must be {length:,} ints, the label of each item, but are {labels.dtype} "
            f"{list(labels.shape)}; mend them, or remove the attribute so that the labels are read from the items"
        )
    return labels.astype(np.int64)


def _read_labels(items: Any, length: int, what: str) -> np.ndarray:
    """Read every item once for its label, showing progress."""
    labels = np.empty(length, dtype=np.int64)
    is_quiet = True if rank() else None  # None disables the bar unless stderr is a terminal
    for position in progress_bar(range(length), desc=f"labels of {what}", unit="img", disable=is_quiet):
        try:
            labels[position] = read_item(items, position, what)[1]
        except OSError as error:
            raise ConfigError(
                f"{what}, item {position}: cannot be read ({printable(shorten(error))}), and so its label is unknown; "
                "mend it, or give the set the attribute targets, a list of all labels"
            ) from error
    return labels


def _classes(items: Any) -> Any:
    return _classes(items.dataset) if isinstance(items, Subset) else getattr(items, "classes", None)


def _check_classes(classes: Any, what: str) -> None:
    is_list = isinstance(classes, list | tuple) and len(classes) > 0
    if not is_list or not all(isinstance(name, str) and 0 < len(name) <= MAX_CLASS_NAME for name in classes):
        shown = "is missing" if classes is None else f"is {printable(shorten(classes))}"
        raise ConfigError(
            f"{what} must have the attribute classes, a list of the classes' names in the order of the labels, which "
            f"{shown}; set it, as in train.classes = ['cat', 'dog']"
        )


def _check_repeatable(own: OwnItems) -> None:
    """Raise ConfigError if one of a few items, evenly spaced, differs when it is read twice."""
    positions = np.unique(np.linspace(0, len(own.labels) - 1, NUM_READ_TWICE, dtype=int)).tolist()
    for position in positions:
        with contextlib.suppress(OSError):  # training reports it
            if own.pixels(position, reading=0) != own.pixels(position, reading=1):
                raise ConfigError(
                    f"{own.what}, item {position}: differs when it is read twice, so a stopped run could not go on as "
                    "if undisturbed; leave random transforms out of the set: augment.target=... takes your own, and "
                    "augment=... has others"
                )
