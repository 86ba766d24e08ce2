"""`sasa-data verify`, which decodes every image once and reports the contents and problems of a data set."""

import hashlib
import multiprocessing
import os
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sasa_train.config.keys import MODES, DataConfig
from sasa_train.data.class_names import composed, look_alikes, twins, with_nearest
from sasa_train.data.datasets import (
    CLASS_FOLDERS,
    SHARDS,
    ImageSet,
    UnreadableImage,
    beside_splits,
    doubts_about,
    holds_shards,
    images_beside_splits,
    kind_of,
    labelled,
    listed_folders,
    load_shard_set,
    load_train,
    load_val_set,
    only_class,
    read_lists,
    refuse_splits,
    split_folders,
    unlike,
)
from sasa_train.data.decoding import WHITE, Decoding, decode, decoding_of, is_16_bit, is_turned
from sasa_train.data.doubtful import describe_dark
from sasa_train.data.hf_sets import build_hf
from sasa_train.data.listing import LeftOut
from sasa_train.data.quarantine import fully
from sasa_train.data.shards import SPLIT_NAMES
from sasa_train.data.tiff import DESCRIPTION, tags
from sasa_train.refusal import ConfigError
from sasa_train.terminal import DONE, FAILED, printable, progress_bar, some

MAX_TABLE = 50  # maximum number of classes listed one per line
MAX_ACROSS, MAX_WITHIN = 20, 5  # maximum number of duplicate groups shown
LEVELS = np.arange(256) / 255

SATURATED = 0.99  # share of pixels that are black or white in a channel that was probably clipped


class Look(NamedTuple):
    """What one image holds; arrays are float64 with one column per channel, for values in [0, 1]."""

    mode: str
    size: tuple[int, int]
    digest: bytes  # of the size and the decoded pixels
    moments: np.ndarray  # [2, C]: mean, mean square
    extremes: np.ndarray  # [2, C]: shares of black and of white
    peak: float | None  # the largest value of an image with 16 bits per channel
    is_turned: bool
    is_transparent: bool
    has_further: bool  # frames or pages after the one that is read


@dataclass
class Contents:
    """The contents of a data set with its splits concatenated; `split_of[i]` and `labels[i]` belong to image i.

    `faults` lists classes without images in a split, `unused` says what each split leaves out, and `ambiguous` lists
    class names that are in a split in two Unicode forms. `mixed` lists splits that are not read, because the rest is
    of another kind. `single` lists classes that no hold-out from train can split. `alone` describes the only class.
    `doubtful` says what is read, though it may not be meant.
    """

    root: Path
    kind: str
    classes: list[str]
    splits: dict[str, ImageSet]
    faults: list[str]
    unused: list[str]
    ambiguous: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    alone: str = ""
    doubtful: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sets = list(self.splits.values())
        self.starts = np.cumsum([0, *(len(images) for images in sets)])
        self.split_of = np.repeat(np.arange(len(sets)), np.diff(self.starts))
        self.labels = np.concatenate([images.labels for images in sets])
        is_single = np.bincount(self.labels, minlength=len(self.classes)) == 1
        is_train_alone = list(self.splits) == ["train"] and not self.mixed
        self.single = [self.classes[i] for i in np.flatnonzero(is_single).tolist()] if is_train_alone else []

    def name(self, index: int) -> str:
        split = int(self.split_of[index])
        name = list(self.splits.values())[split].name(index - int(self.starts[split]))
        return printable(name.removeprefix(f"{self.root}{os.sep}"))


class Survey:
    """The results of decoding n images.

    `sizes`, int64 [n, 2], holds widths and heights (0 if unreadable). `moments`, float64 [n, 2, C], holds the mean and
    mean square of each channel for values in [0, 1]. `alike` maps pixel digests to indices, and `unreadable` maps
    indices to reasons. `extremes`, float64 [n, 2, C], holds the shares of black and white. `peaks` lists the largest
    values of the 16-bit images.
    """

    def __init__(self, num_images: int, channels: int):
        self.sizes, self.moments = np.zeros((num_images, 2), dtype=np.int64), np.zeros((num_images, 2, channels))
        self.extremes, self.peaks = np.zeros((num_images, 2, channels)), list[float]()
        self.num_turned, self.num_transparent, self.num_further = 0, 0, 0
        self.alike: defaultdict[bytes, list[int]] = defaultdict(list)
        self.modes, self.unreadable = Counter[str](), dict[int, str]()

    def add(self, index: int, look: Look) -> None:
        self.sizes[index], self.moments[index], self.extremes[index] = look.size, look.moments, look.extremes
        self.alike[look.digest].append(index)
        self.modes[look.mode] += 1
        self.peaks += [] if look.peak is None else [look.peak]
        self.num_turned += look.is_turned
        self.num_transparent += look.is_transparent
        self.num_further += look.has_further


def verify(root: Path, num_workers: int, all_classes: bool, config: DataConfig) -> int:
    """Print the report; return DONE if there are no problems, otherwise FAILED.

    Raises:
        ConfigError: `root` contains no classes, or what `config` names is not valid.
    """
    read = {"list": read_listed, "hf": read_hf}.get(config.name)
    contents = read(config) if read is not None else read_contents(root)
    print_classes(contents, all_classes)
    survey = look_at_all(contents, num_workers, decoding_of(config))
    print_survey(contents, survey)
    lost = print_lost_classes(contents, survey)
    num_across = print_duplicates(contents, survey)
    print_mean_std(contents, survey)
    warnings = [*contents.doubtful, *look_alikes(contents.classes), *find_warnings(survey)]
    if len(contents.splits) == 1 and any(len(group) > 1 for group in survey.alike.values()):
        warnings.append("some images are equal: a hold-out may put one into train and the other into val; keep one")
    if contradicting := sum(len(set(contents.labels[group])) > 1 for group in survey.alike.values()):
        warnings.append(f"{counted(contradicting, 'group')} of equal images with different labels: keep the right one")
    for warning in warnings:
        say("warning", warning)
    found = {
        counted(len(survey.unreadable), "unreadable file"): len(survey.unreadable),
        counted(lost, "class", "classes") + " without a readable image": lost,
        counted(num_across, "duplicate") + " across splits": num_across,
        counted(len(contents.faults), "empty or missing class", "empty or missing classes"): len(contents.faults),
        counted(len(contents.single), "class", "classes") + " of one image": len(contents.single),
        counted(len(contents.ambiguous), "ambiguous class name"): len(contents.ambiguous),
        counted(len(contents.mixed), "split") + " of another kind or name": len(contents.mixed),
        "only one class": bool(contents.alone),
    }
    problems = [text for text, number in found.items() if number]
    if problems:
        print(f"\n{counted(sum(found.values()), 'problem')}: {', '.join(problems)}")
        return FAILED
    wrong = f"no problems, {counted(len(warnings), 'warning')}" if warnings else "nothing wrong"
    print(f"\n{counted(len(contents.labels), 'image')}, {wrong}")
    return DONE


def read_contents(root: Path) -> Contents:
    """Find the splits and classes in `root` as training does, but record faults instead of raising an error.

    Raises:
        ConfigError: the folder contains no classes, or a split holds shards and class folders.
    """
    kinds = {split: kind for split in SPLIT_NAMES if (kind := kind_of(root, split))}
    kind = SHARDS if holds_shards(root) else CLASS_FOLDERS
    others = {split: unlike(split, of_split, kind) for split, of_split in kinds.items() if of_split != kind}
    # test is read only where val is not there, and ImageNet's archive of it may be in the root
    skipped = [others.pop("test")] if "test" in others and "val" in kinds else []
    mixed = list(others.values())
    if kind == SHARDS:
        left_out, there = LeftOut(), [split for split in kinds if kinds[split] == SHARDS]
        splits = {split: load_shard_set(root, split, left_out) for split in there}
        classes = max((images.classes for images in splits.values()), key=len)
        alone = only_class(classes[0], "", []) if len(classes) == 1 else ""
        faults = _faults(classes, splits, {})
        unused = [left_out.describe(), *_beside(root), *skipped]
        return Contents(root, kind, classes, splits, faults, unused, mixed=mixed, alone=alone)
    found, unused, ambiguous, doubtful = dict[str, dict[str, list[str]]](), [], [], list[str]()
    for split, folder in find_splits(root).items():
        folders, left_out = listed_folders(folder)
        ambiguous += [f"{names}: one name in two Unicode forms in {split}" for names in twins(list(folders))]
        found[split] = merged(folders)
        doubtful += doubts_about(list(found[split]), left_out, folder, root)
        if split == "all":
            refuse_splits(root, left_out)
        unused.append(left_out.describe(str(root)))
    mixed += _misnamed(list(found), beside_splits(root))
    unused += _beside(root)
    classes = sorted(set().union(*found.values()))
    if not classes:
        raise ConfigError(
            f"ROOT={root} must hold train/ and val/ (or test/) with one folder per class, or tar shards, or class "
            f"folders; there is no class folder{_in_splits(found)}"
        )
    splits = {split: labelled({name: there.get(name, []) for name in classes}) for split, there in found.items()}
    faults = _faults(classes, splits, found)
    alone = _alone(root, classes, splits) if len(classes) == 1 else ""
    return Contents(root, kind, classes, splits, faults, [*unused, *skipped], ambiguous, mixed, alone, doubtful)


def _beside(root: Path) -> list[str]:
    beside = beside_splits(root) + images_beside_splits(root)
    return [f"beside train/, val/ and test/: {some(beside)}"] if beside else []


def _misnamed(splits: list[str], beside: list[str]) -> list[str]:
    """Name the folders that may be meant as the split that training misses, such as validation/."""
    missing = [] if "train" in splits else ["train/"]
    missing += [] if {"val", "test"} & set(splits) else ["val/ or test/"]
    return [f"no {' and no '.join(missing)}, but {some(beside)}, which training refuses"] if missing and beside else []


def read_listed(config: DataConfig) -> Contents:
    """Read the lists of train and, if it is named, val as training does.

    Raises:
        ConfigError: a list is not valid.
    """
    lists = read_lists(config)
    classes = list(lists["train"].classes)
    in_nfc, splits = composed(classes), {}
    for split, each in lists.items():
        found = merged(each.classes)
        splits[split] = labelled({name: found.get(key, []) for name, key in zip(classes, in_nfc, strict=True)})
    unused = [each.left_out.describe() for each in lists.values()]
    alone = only_class(classes[0], "", []) if len(classes) == 1 else ""
    root = Path(str(config.train))
    return Contents(root, "list", classes, splits, _faults(classes, splits, {}), unused, alone=alone)


def read_hf(config: DataConfig) -> Contents:
    """Read train and, if it is there, val of a Hugging Face data set as training does.

    Raises:
        ConfigError: the set is not valid.
    """
    splits = {"train": load_train(config)}
    if "val" in build_hf(config):
        splits["val"] = load_val_set(config, splits["train"].classes)
    classes, root = splits["train"].classes, Path(str(config.dataset))
    return Contents(root, "Hugging Face data set", classes, splits, _faults(classes, splits, {}), [])


def _in_splits(found: Mapping[str, object]) -> str:
    """Return the end of a message if the only folders are named as splits, as classes may be, too."""
    if "all" in found:
        return ""
    names = " and ".join(f"{split}/" for split in found)
    return f" in {names}, which are taken as splits; if these are the classes, move both into a folder train/"


def _alone(root: Path, classes: list[str], splits: dict[str, ImageSet]) -> str:
    split, images = next(iter(splits.items()))
    folder = root if split == "all" else root / split
    return only_class(classes[0], str(folder), [images.name(i) for i in range(len(images))])


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of the splits that are there, or {"all": root} if `root` itself contains the classes."""
    return {name: root / name for name in split_folders(root)} or {"all": root}


def merged(folders: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the files by class name in NFC."""
    classes: dict[str, list[str]] = {}
    for name, paths in zip(composed(list(folders)), folders.values(), strict=True):
        classes.setdefault(name, []).extend(paths)
    return classes


def _faults(classes: list[str], splits: dict[str, ImageSet], folders: dict[str, dict[str, list[str]]]) -> list[str]:
    faults = []
    for split, images in splits.items():
        for label in np.flatnonzero(np.bincount(images.labels, minlength=len(classes)) == 0):
            name, there = classes[label], folders.get(split, {})
            if split not in folders or name in there:
                faults.append(f"{printable(name)}: no image in {split}")
            else:
                others = [other for other in there if any(other not in of_split for of_split in folders.values())]
                faults.append(f"{with_nearest(name, others)}: no folder in {split}")
    return faults


_sets: list[ImageSet] = []  # set in each worker process


def look_at_all(contents: Contents, num_workers: int, decoding: Decoding) -> Survey:
    """Decode every image in `num_workers` processes, with a progress bar."""
    num_images = len(contents.labels)
    survey = Survey(num_images, MODES[decoding.mode])
    # Fork, so that the workers inherit the image sets without pickling. ProcessPoolExecutor detects killed workers.
    workers = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), _start_worker, (list(contents.splits.values()),)
    )
    places = contents.split_of.tolist(), (np.arange(num_images) - contents.starts[contents.split_of]).tolist()
    try:
        looks = workers.map(partial(_look, decoding), *places, chunksize=32)
        for i, look in enumerate(progress_bar(looks, desc="decoding", total=num_images, unit="img")):
            if isinstance(look, str):
                survey.unreadable[i] = look
            else:
                survey.add(i, look)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"--workers={num_workers}: a process was killed, for its memory perhaps; use fewer"
        ) from error
    finally:
        workers.shutdown(cancel_futures=True)
    return survey


def _start_worker(sets: list[ImageSet]) -> None:
    global _sets
    _sets = sets
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C


def _look(decoding: Decoding, split: int, index: int) -> Look | str:
    try:
        return _sets[split].read(index, partial(measure, decoding=decoding))
    except UnreadableImage as error:
        return error.reason


def measure(image: Image.Image, decoding: Decoding) -> Look:
    """Decode an image; the digest is that of the decoded pixels."""
    mode, is_deep = image.mode, is_16_bit(image)
    decoded, turned = decode(image, decoding), is_turned(image, decoding)
    digest = hashlib.blake2b(f"{decoded.width} x {decoded.height}".encode(), digest_size=16)
    digest.update(decoded.tobytes())
    if decoded.mode == "F":  # grey16
        levels, counts = np.unique(np.asarray(decoded) / WHITE["grey16"], return_counts=True)
        shares = counts[None] / counts.sum()
    else:
        levels = LEVELS
        shares = np.array(decoded.histogram()).reshape(-1, 256) / (decoded.width * decoded.height)
    moments = np.stack([(shares * levels).sum(1), (shares * levels**2).sum(1)])
    extremes = np.stack([shares[:, levels == level].sum(1) for level in (0, 1)])
    peak = float(levels[shares.any(axis=0)].max()) if is_deep else None
    transparent, further = image.has_transparency_data, has_further_frames(image)
    return Look(mode, decoded.size, digest.digest(), moments, extremes, peak, turned, transparent, further)


def has_further_frames(image: Image.Image) -> bool:
    """Whether a loaded image has frames or pages after the one that was loaded; previews in photos do not count."""
    if image.format == "MPO":
        return False
    # ImageJ may describe a stack whose images follow one another in the file without further pages.
    if re.search(r"\AImageJ=.*^images=(?!1$)", str(tags(image).get(DESCRIPTION, "")), re.DOTALL | re.MULTILINE):
        return True
    try:
        image.seek(image.tell() + 1)
    except Exception:  # Pillow's plugins have no common base class
        return False
    return True


def find_warnings(survey: Survey) -> list[str]:
    """List signs that values are read in another range than they were written in, in words."""
    good = survey.sizes[:, 0] > 0
    if not good.any():
        return []
    warnings = []
    mean, square = survey.moments[good].mean(axis=0)
    black, white = survey.extremes[good].mean(axis=0)
    channels = ("red", "green", "blue") if len(mean) == 3 else ("grey",)
    for name, m, s, b, w in zip(channels, mean, square, black, white, strict=True):
        if s - m**2 < 1e-9:
            warnings.append(f"{name} is constant, {m:.4f} in all pixels")
        elif b + w > SATURATED and set(survey.modes) != {"1"}:
            warnings.append(f"{name} is saturated: 0 in {b:.1%} and 1 in {w:.1%} of the pixels")
    if dark := describe_dark(survey.peaks):
        warnings.append(dark)
    return warnings


def print_classes(contents: Contents, all_classes: bool) -> None:
    counts = [np.bincount(images.labels, minlength=len(contents.classes)) for images in contents.splits.values()]
    print(f"{printable(contents.root)}: {contents.kind}, {len(contents.classes):,} classes\n")
    if len(contents.classes) <= MAX_TABLE or all_classes:
        names = [printable(name) for name in contents.classes]
        width = max(len("class"), *(len(name) for name in names))
        print(f"{'class':<{width}}" + "".join(f" {split:>9}" for split in contents.splits))
        for name, *numbers in zip(names, *counts, strict=True):
            print(f"{name:<{width}}" + "".join(f" {number:>9,}" for number in numbers))
        print()
    else:
        for split, of_class in zip(contents.splits, counts, strict=True):
            low, median, high = of_class.min(), np.median(of_class), of_class.max()
            say("per class", f"min {low:,}, median {median:,.10g}, max {high:,} images in {split}")
    say("images", ", ".join(f"{len(images):,} {split}" for split, images in contents.splits.items()))
    if list(contents.splits) == ["train"] and not contents.mixed:
        of_kind = {"list": "no data.val", "Hugging Face data set": "no validation or test"}.get(contents.kind)
        needs = "no val/ or test/: training needs data.holdout_fraction"
        say("", f"{of_kind}: training holds out a part" if of_kind else needs)
    elif "val" in contents.splits and "test" in contents.splits:
        say("", "training evaluates on val, or with data.split=test on test")
    for fault in contents.faults + contents.ambiguous + [contents.alone] * bool(contents.alone):
        say("class", fault)
    for fault in contents.mixed:
        say("split", fault)
    if contents.single:
        say("class", f"one image alone, which data.holdout_fraction cannot split: {some(contents.single)}")
    for left_out in filter(None, contents.unused):
        say("not read", left_out)


def print_survey(contents: Contents, survey: Survey) -> None:
    sizes = Counter(map(tuple, survey.sizes[survey.sizes[:, 0] > 0].tolist()))
    if len(sizes) == 1:
        say("size", "{} x {} pixels, all of them".format(*next(iter(sizes))))
    elif sizes:
        by_area = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
        smallest, median, largest = (f"{w} x {h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        say("sizes", f"{smallest} smallest, {median} median, {largest} largest, {len(sizes):,} distinct")
    if survey.modes:
        say("modes", ", ".join(f"{number:,} {mode}" for mode, number in survey.modes.most_common()))
    if survey.num_turned:
        say("turned", f"{counted(survey.num_turned, 'image')} by EXIF orientation, see data.exif")
    if survey.num_transparent:
        say("transparent", f"{counted(survey.num_transparent, 'image')}, see data.background")
    if survey.num_further:
        say("frames", f"{counted(survey.num_further, 'image')} with further frames or pages, which are not read")
    for index, reason in survey.unreadable.items():
        say("unreadable", f"{contents.name(index)}: {printable(reason)}")


def print_lost_classes(contents: Contents, survey: Survey) -> int:
    """Name the classes of which all images in a split are unreadable; return their number."""
    is_lost = np.isin(np.arange(len(contents.labels)), list(survey.unreadable))
    number = 0
    for split_number, split in enumerate(contents.splits):
        in_split = contents.split_of == split_number
        lost = fully(contents.labels[in_split], is_lost[in_split], len(contents.classes))
        number += len(lost)
        for label in lost:
            say("class", f"{printable(contents.classes[label])}: no image in {split} can be read")
    return number


def print_duplicates(contents: Contents, survey: Survey) -> int:
    """Print groups of images with identical pixels; return the number of groups that span several splits."""
    groups = [group for group in survey.alike.values() if len(group) > 1]
    across = [group for group in groups if len(set(contents.split_of[group])) > 1]
    if len(contents.splits) > 1:
        _print_groups(contents, f"across {' and '.join(contents.splits)}", across, MAX_ACROSS)
    for number, split in enumerate(contents.splits):
        of_split = [[index for index in group if contents.split_of[index] == number] for group in groups]
        within = [group for group in of_split if len(group) > 1]
        _print_groups(contents, f"within {split}", within, MAX_WITHIN)
    return len(across)


def _print_groups(contents: Contents, where: str, groups: list[list[int]], limit: int) -> None:
    shown = sorted(groups, key=lambda group: len(set(contents.labels[group])) == 1)  # contradicting labels first
    num_contradicting = sum(len(set(contents.labels[group])) > 1 for group in groups)
    labels = f", {num_contradicting:,} with different labels" if num_contradicting else ""
    say("duplicates", f"{counted(len(groups), 'group')} {where}{labels}" if groups else f"none {where}")
    for group in shown[:limit]:
        say("", "  " + some([contents.name(index) for index in group], " = "))
    if len(shown) > limit:
        say("", f"  and {len(shown) - limit:,} more")


def print_mean_std(contents: Contents, survey: Survey) -> None:
    """Print the mean and std of the first split (train or all), averaged over images, as command-line overrides."""
    first = (survey.sizes[:, 0] > 0) & (contents.split_of == 0)
    if first.any():
        mean, square = survey.moments[first].mean(axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        numbers = [",".join(f"{value:.4f}" for value in values) for values in (mean, std)]
        say("mean, std", f"data.mean=[{numbers[0]}] data.std=[{numbers[1]}]")


def say(label: str, text: str) -> None:
    print(f"{label:<11} {text}")


def counted(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
