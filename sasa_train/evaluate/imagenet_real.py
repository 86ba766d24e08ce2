"""Evaluation with ImageNet-ReaL (Beyer et al. 2020, arXiv 2006.07159), which lists all classes shown in each val image.

A prediction is correct if it is one of the image's classes; images without a class are left out.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from timm.data import ImageNetInfo

from sasa_train.files import read_regular
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

NUM_IMAGES, NUM_CLASSES = 50_000, 1000
TIMM = "timm"  # the value that selects the copy shipped with timm
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")


@dataclass(frozen=True)
class RealLabels:
    """The ReaL labels; `sets[i]` contains the classes of val image i as indices into the model's classes."""

    sets: list[frozenset[int]]

    def of(self, names: Sequence[str]) -> list[frozenset[int]]:
        """Return the classes of the images with the given file names.

        Raises:
            ConfigError: a name does not belong to an ImageNet val image, or no image has a label.
        """
        found = [VAL_NAME.search(name) for name in names]
        numbers = [int(match[1]) if match else 0 for match in found]
        wrong = [name for name, number in zip(names, numbers, strict=True) if not 1 <= number <= NUM_IMAGES]
        if wrong:
            raise ConfigError(
                f"--real: {len(wrong):,} of {len(names):,} images are none of ImageNet's val, as "
                f"{printable(wrong[0])}; their names must be ILSVRC2012_val_00000001.JPEG to ..._{NUM_IMAGES:08d}.JPEG"
            )
        sets = [self.sets[number - 1] for number in numbers]
        _check_any(sets)
        return sets


@dataclass(frozen=True)
class RealResult:
    """Accuracy in percent on images with ReaL labels, by those labels (`top1`) and ImageNet's own (`top1_original`)."""

    top1: float
    top1_original: float
    num_images: int
    num_left_out: int


def load_real_labels(source: str, classes: Sequence[str]) -> RealLabels:
    """Read real.json, or timm's copy if `source` is "timm", for a model with the given classes.

    If the model has only some of ImageNet's classes, the labels of the other classes are dropped.

    Raises:
        ConfigError: a class is not an ImageNet class, or the file is not real.json.
    """
    wnids = ImageNetInfo().label_names()
    if foreign := [name for name in classes if name not in set(wnids)]:
        raise ConfigError(
            f"--real: {len(foreign):,} of {len(classes):,} classes are none of ImageNet's {NUM_CLASSES:,}, as "
            f"{printable(foreign[0])}; ReaL is for models of ImageNet, with classes named n01440764, ..."
        )
    position = {name: i for i, name in enumerate(classes)}
    found = ([wnids[i] for i in of_image] for of_image in _read(source))
    return RealLabels([frozenset(position[wnid] for wnid in of_image if wnid in position) for of_image in found])


def evaluate_real(sets: Sequence[frozenset[int]], predictions: Sequence[int], labels: Sequence[int]) -> RealResult:
    """Compare predictions with the label sets; raise ConfigError if no image has a label."""
    _check_any(sets)
    rows = [row for row in zip(sets, predictions, labels, strict=True) if row[0]]
    hits = sum(prediction in of_image for of_image, prediction, _ in rows)
    original = sum(prediction == label for _, prediction, label in rows)
    return RealResult(100 * hits / len(rows), 100 * original / len(rows), len(rows), len(sets) - len(rows))


def _check_any(sets: Sequence[frozenset[int]]) -> None:
    if not any(sets):
        raise ConfigError(f"--real: none of the {len(sets):,} images has a label; there is nothing to evaluate")


def _read(source: str) -> list[list[int]]:
    own = resources.files("timm.data") / "_info/imagenet_real_labels.json"
    try:
        found = json.loads(own.read_bytes() if source == TIMM else read_regular(Path(source)))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--real {source}: cannot be read ({error}); give real.json, or timm for its copy") from error
    is_list = isinstance(found, list) and len(found) == NUM_IMAGES and all(isinstance(item, list) for item in found)
    if not is_list or not all(type(n) is int and 0 <= n < NUM_CLASSES for item in found for n in item):
        raise ConfigError(
            f"--real {source}: must be a list of {NUM_IMAGES:,} lists of numbers from 0 to {NUM_CLASSES - 1}, as "
            "real.json of github.com/google-research/reassessed-imagenet is"
        )
    return found
