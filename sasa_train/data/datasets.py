"""The data sets: where the images are, their labels and classes, and fixed, balanced parts of them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets as tv

from sasa_train.config import NUM_CLASSES, ConfigError, DataConfig
from sasa_train.data.randomness import fixed_order

DIGITS_VAL_FRACTION = 0.2

# Per-channel mean and std of the training images, of values in [0, 1].
MEAN_STD = {
    "digits": ((0.3050,) * 3, (0.3756,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "image_folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass
class ImageSet:
    """Labelled RGB images, on disk (`paths`) or in memory (`arrays`, uint8 [n, 3, H, W]); `labels` is int64 [n]."""

    classes: list[str]
    labels: np.ndarray
    paths: np.ndarray | None = None
    arrays: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            ConfigError: the file is missing or is no image; the message names it.
        """
        if self.arrays is not None:
            return Image.fromarray(self.arrays[index].permute(1, 2, 0).numpy())
        assert self.paths is not None
        path = str(self.paths[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{path}: cannot be read as an image ({error}); repair or remove it") from error

    def subset(self, indices: np.ndarray) -> "ImageSet":
        return dataclasses.replace(
            self,
            labels=self.labels[indices],
            paths=None if self.paths is None else self.paths[indices],
            arrays=None if self.arrays is None else self.arrays[torch.from_numpy(indices)],
        )


def load_image_sets(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return train and val as `config` says: data set, hold-out, balanced subsets.

    Raises:
        ConfigError: a missing folder, an empty class, classes that differ between train and val, or too few of them.
    """
    if config.name == "digits":
        train, val = _load_digits()
    elif config.name in ("cifar10", "cifar100") and not (Path(config.root) / "train").is_dir():
        train, val = _load_cifar(config, train=True), _load_cifar(config, train=False)
    else:
        train, val = _load_folders(config)
    if config.holdout_fraction > 0:
        train, val = split(train, config.holdout_fraction)
    train = _limit(train, config.max_train_images)
    val = _limit(val, config.max_val_images)
    expected = NUM_CLASSES.get(config.name)
    if expected is not None and len(train.classes) != expected:
        raise ConfigError(
            f"data.root={config.root}: {config.name} has {expected} classes, but {len(train.classes)} class folders "
            "are there; use data=image_folder for a set of your own"
        )
    return train, val


def split(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Split off a stratified, fixed part (at least one image a class): train without it, and the part as val."""
    held_out = []
    for members in _by_class(images):
        if len(members) < 2:
            raise ConfigError(f"data.holdout_fraction={fraction}: a class with {len(members)} image cannot be split")
        held_out.append(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])
    val = np.sort(np.concatenate(held_out))
    return images.subset(np.setdiff1d(np.arange(len(images)), val)), images.subset(val)


def _limit(images: ImageSet, count: int | None) -> ImageSet:
    """A fixed subset as balanced as the set allows: every class gives its first image, then its second, and so on."""
    if count is None or count >= len(images):
        return images
    rank = np.empty(len(images), dtype=np.int64)
    for members in _by_class(images):
        rank[members] = np.arange(len(members))
    return images.subset(np.sort(np.lexsort((images.labels, rank))[:count]))


def _by_class(images: ImageSet) -> list[np.ndarray]:
    """For each class its images' indices, in an order that is fixed and looks random."""
    order = fixed_order(len(images))
    return [order[images.labels[order] == label] for label in range(len(images.classes))]


def _load_digits() -> tuple[ImageSet, ImageSet]:
    with resources.files("sasa_train.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(np.int64)
    pixels = torch.from_numpy(np.round(images * (255 / 16)).astype(np.uint8))
    digits = ImageSet([str(d) for d in range(10)], labels, arrays=pixels[:, None].repeat(1, 3, 1, 1))
    return split(digits, DIGITS_VAL_FRACTION)


def _load_cifar(config: DataConfig, train: bool) -> ImageSet:
    dataset = tv.CIFAR10 if config.name == "cifar10" else tv.CIFAR100
    try:
        cifar = dataset(config.root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.root={config.root} holds no {config.name}, and the download failed ({error}); fetch it where there "
            "is a network, or give a root with train/ and test/ class folders"
        ) from error
    return ImageSet(
        list(cifar.classes), np.array(cifar.targets), arrays=torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    )


def _load_folders(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    root = Path(config.root)
    train = _load_class_folders(root / "train", config)
    if config.holdout_fraction > 0:
        return train, train
    val_dir = root / "val" if (root / "val").is_dir() else root / "test"
    val = _load_class_folders(val_dir, config)
    if train.classes != val.classes:
        only_train, only_val = (
            sorted(set(train.classes) - set(val.classes)),
            sorted(set(val.classes) - set(train.classes)),
        )
        raise ConfigError(
            f"data.root={root}: train/ and {val_dir.name}/ must hold the same classes; "
            f"only in train/: {_some(only_train)}; only in {val_dir.name}/: {_some(only_val)}"
        )
    return train, val


def _load_class_folders(folder: Path, config: DataConfig) -> ImageSet:
    if not folder.is_dir():
        raise ConfigError(
            f"data.root={config.root}: there is no folder {folder}; expected train/ and val/ (or test/) with one "
            "folder a class, or train/ alone with data.holdout_fraction"
        )
    try:
        found = tv.ImageFolder(str(folder))
    except FileNotFoundError as error:  # torchvision names the empty classes, or says that there is none
        raise ConfigError(f"{folder}: {error}") from error
    paths, labels = zip(*found.samples, strict=True)
    return ImageSet(found.classes, np.array(labels, dtype=np.int64), paths=np.array(paths))


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
