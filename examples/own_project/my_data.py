"""Data sets of one's own: gratings, drawn when they are needed, and a transform of training images."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Gratings:
    """Grey stripes in one of four directions, with noise. Image i is always the same."""

    classes = ["horizontal", "falling", "vertical", "rising"]  # noqa: RUF012

    def __init__(self, first: int, count: int, size: int, noise: float):
        self.first, self.size, self.noise = first, size, noise
        self.targets = [index % 4 for index in range(count)]  # labels that can be read without drawing images

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        random = np.random.default_rng(self.first + index)
        label = self.targets[index]
        y, x = np.mgrid[: self.size, : self.size]
        angle = math.pi / 4 * label
        waves = np.sin((x * math.sin(angle) + y * math.cos(angle)) * random.uniform(0.6, 1.2) + random.uniform(0, 6))
        pixels = 128 + 60 * waves + random.normal(0, self.noise, waves.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), label


def build(size: int = 24, noise: float = 60.0) -> tuple[Gratings, Gratings]:
    """Return the train and val sets (data.target)."""
    return Gratings(0, 512, size, noise), Gratings(512, 128, size, noise)


def darken(image: Tensor, generator: torch.Generator) -> Tensor:
    """Darken a uint8 image [3, S, S] by a random factor (augment.target)."""
    factor = 0.5 + 0.5 * torch.rand(1, generator=generator)
    return (image * factor).to(torch.uint8)
