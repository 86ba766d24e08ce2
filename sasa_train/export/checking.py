"""Compare the logits and speed of an exported model with those of the original on real images."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sasa_train.data.datasets import ImageSet, load_val_set
from sasa_train.data.reading import image_files, read_fitted
from sasa_train.predict.find_images import find_images
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable
from sasa_train.trained import TrainedModel

NUM_IMAGES = 64
BATCH_SIZES = (1, 7)
# Allowed difference, relative to the largest logit. The order of float32 sums differs in every layer and, in some
# matrix products, with the addresses of equal tensors.
ROUNDING = 1e-5
Run = Callable[[Tensor], Tensor]  # normalised images [B, C, H, W] -> logits [B, classes]


@dataclass
class Measured:
    """The logits of all images and the median speed over batches, in images per second, for each of BATCH_SIZES."""

    logits: list[Tensor]
    images_per_second: list[float]

    def difference(self, expected: "Measured") -> float:
        """Return the largest difference, relative to the largest expected absolute logit, or NaN if a logit is NaN."""
        pairs = zip(self.logits, expected.logits, strict=True)
        return float(np.max([float((got - want).abs().max() / want.abs().max()) for got, want in pairs]))


def load_images(trained: TrainedModel, folder: Path | None) -> tuple[Tensor, str]:
    """Return up to NUM_IMAGES normalised images [n, 3, H, W], evenly spaced in val or `folder`, with a description.

    Raises:
        ConfigError: there are no readable images.
    """
    images, name = _val(trained) if folder is None else _folder(folder)
    indices = np.linspace(0, len(images) - 1, min(NUM_IMAGES, len(images)), dtype=int)
    pixels, *_, unreadable = read_fitted(images, indices, trained.config.data)
    if not len(pixels):
        reason = ": ".join(map(printable, unreadable[0]))
        raise ConfigError(f"none of the images of {name} can be read ({reason}); give a folder of images with --images")
    return trained.normalize(torch.device("cpu"))(pixels).contiguous(), f"{len(pixels)} images of {name}"


def _val(trained: TrainedModel) -> tuple[ImageSet, str]:
    try:
        trained.check_places()
        return load_val_set(trained.config.data, trained.classes), f"val ({trained.config.data.name})"
    except ConfigError as error:
        raise ConfigError(
            f"an export is checked on real images, and the run's are not there ({error}); give a folder of images with "
            "--images, or data.root=..."
        ) from error


def _folder(folder: Path) -> tuple[ImageSet, str]:
    found = list(find_images([str(folder)]))
    paths = [one.path for one in found if not one.fault]
    if not paths:
        raise ConfigError(f"--images {printable(found[0].path)}: {found[0].fault}")
    return image_files(paths), printable(folder)


@torch.inference_mode()
def measure(run: Run, images: Tensor) -> Measured:
    """Process all images once for each of BATCH_SIZES, after a warm-up with the first batch."""
    measured = Measured([], [])
    for batch_size in BATCH_SIZES:
        batches = images.split(batch_size)
        run(batches[0])
        logits, speeds = [], []
        for batch in batches:
            start = time.perf_counter()
            logits.append(run(batch))
            speeds.append(len(batch) / (time.perf_counter() - start))
        measured.logits.append(torch.cat(logits))
        measured.images_per_second.append(float(np.median(speeds)))
    return measured
