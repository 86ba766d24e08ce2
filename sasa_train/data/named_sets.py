"""Data sets of torchvision, chosen by the name of their class (`data=torchvision data.dataset=Flowers102`)."""

import copy
import inspect
from typing import Any

from torchvision import datasets as tv

from sasa_train.config import own_code
from sasa_train.config.keys import DataConfig
from sasa_train.data.class_names import with_nearest
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable

TRAIN_NAMES = ("train", "trainval", "train-standard")  # torchvision's names; the first that a set has
VAL_NAMES = {None: ("val", "valid", "test"), "val": ("val", "valid"), "test": ("test",)}  # likewise, by data.split
UNKNOWN = "Unknown value"  # begins torchvision's error for a split that a set does not have


class NotDownloadedError(ConfigError):
    """Raised if a set of torchvision's is not whole in its folder, and was not or could not be downloaded."""


def build_named(config: DataConfig, download: bool = True) -> tuple[Any, Any]:
    """Return train and val of the class that `data.dataset` names; val is None if the class has one set alone.

    download: fetch what is not in `data.root`, if the class can.

    Raises:
        ConfigError: there is no such class, or it cannot be made.
    """
    name = str(config.dataset)
    taken = parameters(check_dataset(config))
    fixed = {key: value for key, value in (("root", config.folder), ("download", download)) if key in taken}

    def make_split(**split: Any) -> Any:
        with own_code.errors_of(config.place):
            return _with_names(make(name, **fixed | config.args | split))

    if "train" in taken and "train" not in config.args:
        if config.split == "val":
            raise ConfigError(f"data.split=val: {name} has train and test alone; use data.split=test")
        return make_split(train=True), make_split(train=False) if config.holdout_fraction == 0 else None
    if "split" not in taken or "split" in config.args:
        return make_split(), None

    def first(*splits: str) -> Any:
        for split in splits:
            try:
                return make_split(split=split)
            except ConfigError as error:
                if not str(error.__cause__).startswith(UNKNOWN):
                    raise
        return None

    if (train := first(*TRAIN_NAMES)) is None:
        raise ConfigError(f"{config.place}: has no split for train; name one, as in data.args={{split:letters}}")
    return train, first(*VAL_NAMES[config.split]) if config.holdout_fraction == 0 else None


def check_dataset(config: DataConfig) -> type:
    """Return the class that `data.dataset` names.

    Raises:
        ConfigError: torchvision has no such class, or it does not take an argument in `data.args`.
    """
    name = str(config.dataset)
    found = getattr(tv, name, None) if name in tv.__all__ else None
    if not inspect.isclass(found) or not hasattr(found, "__getitem__"):
        raise ConfigError(f"data.dataset={with_nearest(name, tv.__all__)}: is not a data set of torchvision.datasets")
    if unknown := sorted(set(config.args) - parameters(found)):
        raise ConfigError(
            f"data.args: {with_nearest(unknown[0], sorted(parameters(found)))} is not an argument of {name}, which "
            f"takes {', '.join(sorted(parameters(found)))}"
        )
    return found


def parameters(cls: type) -> set[str]:
    """Return the names of the arguments that a class takes, with its base classes' if it passes others on to them."""
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            found = inspect.signature(vars(base)["__init__"]).parameters.values()
            names |= {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if all(p.kind is not p.VAR_KEYWORD for p in found):
                break
    return names - {"self"}


def make(name: str, hint: str = "", **arguments: Any) -> Any:
    """Return an object of a class of torchvision.datasets.

    hint: ends the message if its files are not there.

    Raises:
        NotDownloadedError: it is not in `root`, and the download failed or was not wanted.
        ConfigError: it cannot be made from these arguments.
    """
    try:
        return getattr(tv, name)(**arguments)
    except MemoryError:
        raise
    except (OSError, RuntimeError) as error:
        where = f"data.root={arguments.get('root')} holds no {name}, and it was not downloaded"
        raise NotDownloadedError(f"{where} ({error}); fetch it where there is a network{hint}") from error
    except Exception as error:  # of the class, for what is in data.args
        reason = printable(shorten(error))
        raise ConfigError(f"data.dataset={name}: cannot be made ({type(error).__name__}: {reason})") from error


def _with_names(items: Any) -> Any:
    """Give a set the attributes `targets`, `samples` and `classes`, as most of torchvision's have them, if it can."""
    loader = getattr(items, "loader", None)
    if not hasattr(items, "targets") and callable(loader):
        # Without this, every image would be decoded for its label.
        light = copy.copy(items)
        light.loader, light.transform, light.transforms = str, None, None
        items.samples = [light[i] for i in range(len(items))]
        items.targets = [label for _, label in items.samples]
    elif not hasattr(items, "targets") and hasattr(items, "labels"):
        items.targets = items.labels
    classes = getattr(items, "classes", getattr(items, "categories", None))
    if classes is not None:
        items.classes = [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes]
    return items
