"""From a decoded image to the pixels a model sees: uint8 throughout; normalisation is the device's work.

Small images (up to 64 pixels) are cropped after padding and flipped, by one function for a whole resident batch and
for a single streamed image, so that both give the same pixels. Large ones take torchvision's random-resized crop.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config import SMALL_IMAGE, AugmentConfig, DataConfig, resolved_image_size
from sasa_train.data.randomness import sample_draws, sample_rng

VAL_CROP_FRACTION = 0.875  # large images: 224 pixels from a shorter side of 256


class Augment:
    """The training transforms of one config, for images of `size` pixels; all randomness from (seed, epoch, index)."""

    def __init__(self, data: DataConfig, augment: AugmentConfig, seed: int):
        self.size, self.seed = resolved_image_size(data), seed
        self.is_small = self.size <= SMALL_IMAGE
        padding = augment.crop_padding if augment.crop_padding is not None else self.size // 8
        self.padding = padding if augment.crop else 0
        self.hflip = augment.hflip if augment.hflip is not None else data.name != "digits"
        crop = v2.RandomResizedCrop(
            self.size, (augment.crop_scale[0], augment.crop_scale[1]), (augment.crop_ratio[0], augment.crop_ratio[1])
        )
        fit_large = v2.Lambda(partial(_fit_image, size=self.size))
        self.large = v2.Compose(
            [crop if augment.crop else fit_large, v2.RandomHorizontalFlip(0.5 if self.hflip else 0.0)]
        )

    def small(self, images: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        """Crop after zero padding, and flip, each image its own way; uint8 [B, C, S, S] on any device."""
        if not self.padding and not self.hflip:
            return images
        draws = sample_draws(self.seed, epoch, indices, 3)
        offsets = (draws[:, :2] * (2 * self.padding + 1)).astype(np.int64)
        place = np.arange(self.size)
        rows = offsets[:, :1] + place  # [B, S] in the padded image
        cols = offsets[:, 1:] + place
        if self.hflip:
            cols = np.where(draws[:, 2:] < 0.5, cols[:, ::-1], cols)
        rows_t, cols_t = to_device(rows, images.device), to_device(cols, images.device)
        padded = F.pad(images, [self.padding] * 4)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        # Indices around the sliced channels bring them last: [B, S, S, C]
        return padded[batch, :, rows_t[:, :, None], cols_t[:, None, :]].permute(0, 3, 1, 2)

    def streamed(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """One image, augmented, uint8 [3, S, S]."""
        if self.is_small:
            return self.small(fit(image, self.size)[None], epoch, np.array([index]))[0]
        with sample_rng(self.seed, epoch, index):
            return v2.functional.pil_to_tensor(self.large(image))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy without waiting for a CUDA device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fit(image: Image.Image, size: int) -> Tensor:
    """Nothing random: resize the shorter side, crop the centre; uint8 [3, size, size]. What val sees."""
    return v2.functional.pil_to_tensor(_fit_image(image, size))


def _fit_image(image: Image.Image, size: int) -> Image.Image:
    shorter = size if size <= SMALL_IMAGE else math.ceil(size / VAL_CROP_FRACTION)
    if image.size != (size, size) or shorter != size:
        image = v2.functional.resize(image, [shorter], antialias=True)
        image = v2.functional.center_crop(image, [size, size])
    return image


class Normalize:
    """uint8 [B, 3, H, W] -> float32 on the same device, mean 0 and std 1 a channel over the training images."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool):
        self.mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self.std = torch.tensor(std, device=device)[:, None, None] * 255
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
