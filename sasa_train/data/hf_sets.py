"""Data sets of Hugging Face's `datasets`, in a folder or on the Hub (`data=hf data.dataset=NAME_OR_FOLDER`).

Images are kept as they are encoded, so that they are decoded and refused as files are. Nothing runs code of a data set.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sasa_train.config.keys import DataConfig
from sasa_train.data.class_names import MAX_CLASS_NAME, twins, with_nearest
from sasa_train.data.shard_index import MAX_CLASSES
from sasa_train.data.shards import check_image_size
from sasa_train.extras import why_not
from sasa_train.files import did_you_mean, open_regular
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable, some

VAL_NAMES = {
    None: ("validation", "val", "valid", "test"),
    "val": ("validation", "val", "valid"),
    "test": ("test",),
}  # by data.split; the first that a set has
ARGUMENTS = ("name", "revision", "data_dir", "data_files", "split")  # of load_dataset
REFUSED = {
    "streaming": "a stream has no random access, which exact runs need",
    "trust_remote_code": "code of a data set is never run",
    "token": "it would be stored with the run; log in with `hf auth login` instead",
}
LEAST_VERSION = 4  # from which on `datasets` runs no code of data sets


@dataclass
class HfImages:
    """The encoded images in `column` of a data set; `what` names the key and the split.

    `folders` are those in which files may lie that the set names instead of containing them.
    """

    items: Any
    column: str
    what: str
    folders: Sequence[str]

    def open(self, position: int) -> BinaryIO:
        """Return the bytes of an image as a file.

        Raises:
            OSError: the set has no image there, or its file cannot be read.
            ConfigError: its file is outside the data set.
        """
        image = self.items[position][self.column] or {}
        content, path = image.get("bytes"), image.get("path")
        if content is not None:
            check_image_size(len(content), self.name(position))
            return io.BytesIO(content)
        if not path:
            raise OSError("the data set has no image here")
        found = (os.path.abspath(os.path.join(folder, path)) for folder in self.folders)
        inside = [one for one, top in zip(found, self.folders, strict=True) if one.startswith(os.path.join(top, ""))]
        if not inside:
            raise ConfigError(
                f"{self.name(position)}: its file {printable(shorten(path))} is outside the data set; save the set "
                "with save_to_disk, which puts the images into it"
            )
        file = open_regular(next(filter(os.path.lexists, inside), inside[0]))
        check_image_size(os.fstat(file.fileno()).st_size, path)
        return file

    def name(self, position: int) -> str:
        return f"{self.what}, item {position}"


def check_hf(config: DataConfig) -> None:
    """Raise ConfigError if `datasets` is missing or too old, or an argument in `data.args` is not taken."""
    if reason := why_not("data=hf", "hf"):
        raise ConfigError(reason)
    import datasets

    if int(datasets.__version__.partition(".")[0]) < LEAST_VERSION:
        raise ConfigError(
            f"data=hf needs datasets {LEAST_VERSION} or newer, but here is {datasets.__version__}: "
            "pip install -U datasets"
        )
    for name in config.args:
        if name in REFUSED:
            raise ConfigError(f"data.args: {name} is not taken: {REFUSED[name]}")
        if name not in ARGUMENTS:
            raise ConfigError(
                f"data.args: {with_nearest(name, ARGUMENTS)} must be one of {', '.join(ARGUMENTS)}, which load_dataset "
                "takes"
            )


def build_hf(config: DataConfig, splits: Sequence[str] = ("train",)) -> dict[str, Any]:
    """Return objects of `datasets` as train and, unless a part of train is held out, val; "" if there is only one set.

    Raises:
        ConfigError: there is no such data set, it has no train, though `splits` names it, or not the split that
            `data.split` or `data.args` names.
    """
    check_hf(config)
    from datasets import Dataset

    found = _load(config)
    if isinstance(found, Dataset):
        return {"": found}
    if "train" in splits and "train" not in found:
        raise ConfigError(
            f"{config.place}: has no split train, but {some(sorted(found))}; name one, as in "
            f"data.args={{split:{min(found)}}}"
        )
    names = VAL_NAMES[config.split] if config.holdout_fraction == 0 else ()
    val = next((name for name in names if name in found), None)
    if val is None and config.split is not None and names:
        raise ConfigError(
            f"data.split={config.split}: {config.place} has no split {' or '.join(names)}, but {some(sorted(found))}"
        )
    return {split: found[name] for split, name in (("train", "train"), ("val", val)) if name in found}


def _load(config: DataConfig) -> Any:
    """Return what is saved in a folder, or what the Hub or a folder of files in a known format has."""
    import datasets

    name = str(config.dataset)
    split = config.args.get("split")
    try:
        if not is_saved(name):
            if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith(("/", ".", "~"))):
                raise ConfigError(
                    f"data.dataset={printable(name)}: there is no such folder{did_you_mean(name)}; give one, or a data "
                    "set of the Hub as USER/NAME"
                )
            return datasets.load_dataset(name, **config.args)
        if set(config.args) - {"split"}:
            raise ConfigError(f"data.args={config.args}: only split is for a folder that save_to_disk has written")
        found = datasets.load_from_disk(name)
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # of `datasets`, pyarrow and the Hub, which have no common base class
        raise ConfigError(
            f"{config.place}: cannot be loaded ({type(error).__name__}: {printable(shorten(error))}); for the Hub, a "
            "network is needed at the first run"
        ) from error
    if split is not None:
        if not isinstance(found, datasets.DatasetDict) or split not in found:
            there = some(sorted(found)) if isinstance(found, datasets.DatasetDict) else "one without a name"
            raise ConfigError(f"data.args={config.args}: {config.place} has no split {split}, but {there}")
        return found[split]
    return found


def is_saved(folder: str | Path) -> bool:
    """Whether `save_to_disk` has written a folder."""
    names = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def is_cached(config: DataConfig) -> bool:
    """Whether a data set is in a folder or, from the Hub, in the cache of `datasets`; the errors of `check_hf`."""
    check_hf(config)
    import datasets

    name = str(config.dataset)
    cached = os.path.join(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))
    return os.path.isdir(name) or os.path.isdir(cached)


def load_hf(config: DataConfig, splits: Sequence[str]) -> list[tuple[list[str], np.ndarray, HfImages]]:
    """Return the classes, the labels, int64 [n], and the images of `splits`, which name train, val or both.

    Raises:
        ConfigError: the set cannot be loaded, or its columns or labels are not those of labelled images.
    """
    sets = build_hf(config, splits)
    from datasets import Image

    folders, loaded = _folders(config), []
    for split in splits:
        is_first = split == splits[0]  # to evaluate a trained model, a single set is val
        items, what = sets.get(split, sets.get("") if is_first else None), f"{printable(config.place)}: {split}"
        if items is None:
            raise ConfigError(f"{what} is not there; set data.holdout_fraction, which takes it from train")
        if len(items) == 0:
            raise ConfigError(f"{what} has no images")
        column, of_labels = find_columns(items.features, config.columns, what)
        classes, labels = _read_labels(items, of_labels, what)
        encoded = items.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
        loaded.append((classes, labels, HfImages(encoded, column, what, folders)))
    return loaded


def _folders(config: DataConfig) -> list[str]:
    """Return the folders in which files of a data set may lie: its own, and those of the Hub's downloads."""
    from datasets import config as cache
    from huggingface_hub.constants import HF_HUB_CACHE

    own = [str(config.dataset)] if os.path.isdir(str(config.dataset)) else []
    folders = [*own, str(cache.HF_DATASETS_CACHE), str(cache.DOWNLOADED_DATASETS_PATH), HF_HUB_CACHE]
    return list(dict.fromkeys(form(folder) for form in (os.path.abspath, os.path.realpath) for folder in folders))


def find_columns(features: Any, columns: Sequence[str], what: str) -> tuple[str, str]:
    """Return the columns of images and labels: the only ones of such a type, or those that `data.columns` names."""
    from datasets import ClassLabel, Image

    shown = ", ".join(f"{printable(name)} ({getattr(f, 'dtype', type(f).__name__)})" for name, f in features.items())
    shown = shorten(shown.replace("(PIL.Image.Image)", "(Image)"))
    if list(columns) != DataConfig().columns:
        if missing := [name for name in columns if name not in features]:
            raise ConfigError(f"{what}: has no column {printable(' or '.join(missing))}; it has {shown}")
        image, label = columns
        if not isinstance(features[image], Image):
            raise ConfigError(f"{what}: the column {printable(image)} must be of the type Image; it has {shown}")
        return image, label
    found = {kind: [name for name, f in features.items() if isinstance(f, kind)] for kind in (Image, ClassLabel)}
    if any(len(names) != 1 for names in found.values()):
        numbers = " and ".join(f"{len(names)} of the type {kind.__name__}" for kind, names in found.items())
        remedy = "name both, as in data.columns=[image,label]"
        raise ConfigError(f"{what}: of its columns, {numbers}; {remedy}; it has {shown}")
    return found[Image][0], found[ClassLabel][0]


def _read_labels(items: Any, column: str, what: str) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes and the labels, without reading an image."""
    from datasets import ClassLabel, Value

    feature, where = items.features[column], f"{what}: the column {printable(column)}"
    kind = feature.dtype if isinstance(feature, Value | ClassLabel) else type(feature).__name__
    is_text = kind in ("string", "large_string")
    if not is_text and not kind.startswith(("int", "uint")):
        raise ConfigError(f"{where} must hold whole numbers or texts as labels, but holds {kind}")
    values = items.select_columns([column]).with_format("arrow")[:].column(column)
    given = values.drop_null()
    found = np.array(given.to_pylist(), dtype=object) if is_text else np.asarray(given)
    if num_missing := len(values) - int(np.count_nonzero(found != "" if is_text else found >= 0)):
        raise ConfigError(
            f"{where} has no label for {num_missing:,} of {len(values):,} images; use another split (data.split, or "
            "data.args={split:NAME}), or take val from train (data.holdout_fraction)"
        )
    if is_text:
        classes = sorted(set(found.tolist()))
        number = {name: label for label, name in enumerate(classes)}
        found = np.array([number[name] for name in found.tolist()])
    elif isinstance(feature, ClassLabel):
        classes = list(feature.names)
    else:
        classes = [str(label) for label in range(min(int(found.max()) + 1, MAX_CLASSES))]
    if found.max() >= len(classes):
        raise ConfigError(f"{where} has the label {found.max():,}, but labels go from 0 to {len(classes) - 1:,}")
    _check_names(classes, where)
    return classes, found.astype(np.int64)


def _check_names(classes: list[str], where: str) -> None:
    if (longest := max(classes, key=len)) and len(longest) > MAX_CLASS_NAME:
        raise ConfigError(f"{where} has {printable(shorten(longest))}; a class's name has {MAX_CLASS_NAME:,} at most")
    if same := twins(classes):
        raise ConfigError(f"{where} has labels that are the same in different Unicode forms: {some(same)}")
