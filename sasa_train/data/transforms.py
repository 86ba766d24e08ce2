"""Transforms from an image on disk to the model's input; images stay uint8 until they are normalised on the device.

Small images (up to 64 pixels) are padded, cropped, flipped and so on in whole batches by both kinds of loader,
which therefore yield the same pixels. Larger images are cropped and resized one by one during decoding.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config.derived import crops_by_padding, flips_images, resolved_image_size, resolved_interpolation
from sasa_train.config.keys import SMALL_IMAGE, AugmentConfig, DataConfig
from sasa_train.data.decoding import DEFAULT, Decoding, decoding_of, to_rgb, upright_size
from sasa_train.data.own_transform import load_transform, transform_all
from sasa_train.data.policies import NUM_DRAWS, Policy, to_device
from sasa_train.data.randomness import CROP, ERASING, POLICY, sample_draws, sample_rng

VAL_CROP = 0.875  # default of data.val_crop: a 224-pixel crop from a shorter side of 256
MAX_ASPECT = 64  # of an image before its centre crop; the ends of longer images are cut off
CROP_TRIES = 10  # for the random-resized crop, as in torchvision
Shape = Callable[[Image.Image], np.ndarray]  # an image, not decoded yet -> uint8 [S, S, 3]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Augment:
    """A config's training transforms for images of `size` pixels; all randomness depends on (seed, epoch, index).

    Raises:
        ConfigError: the user's own transform (`augment.target`) cannot be imported.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, seed: int, mean: Sequence[float]):
        self.data, self.config, self.size, self.seed = data, augment, resolved_image_size(data), seed
        self.decoding = decoding_of(data)
        self.by_batch = crops_by_padding(data, augment)
        padding = augment.crop_padding if augment.crop_padding is not None else self.size // 8
        self.padding = padding if augment.crop else 0
        self.hflip = flips_images(data, augment)
        self.policy = Policy(augment) if augment.policy != "none" else None
        strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
        self.jitter = v2.ColorJitter(*strengths) if any(strengths) else None
        self.own = load_transform(augment)
        self.mean = torch.tensor(mean).mul(255).round().to(torch.uint8)[:, None, None]

    def pad(self, images: Tensor) -> Tensor:
        """Pad uint8 images [B, 3, S, S] with zeros if `batch` will crop them."""
        return F.pad(images, [self.padding] * 4) if self.by_batch and self.padding else images

    def batch(self, padded: Tensor, where: np.ndarray, epoch: int, indices: np.ndarray) -> Tensor:
        """Augment rows `where` of `padded`, which are images `indices` of the data set; return uint8 [B, 3, S, S]."""
        if not self.by_batch:  # streamed: `padded` is the batch, and all other transforms were applied in decoding
            return self._erase(self._by_own(padded, epoch, indices), epoch, indices)
        rows = to_device(where, padded.device)
        images = self._crop_and_flip(padded, rows, sample_draws(self.seed, epoch, indices, 3, CROP))
        if self.policy:
            images = self.policy.batch(images, sample_draws(self.seed, epoch, indices, NUM_DRAWS, POLICY))
        if self.jitter:
            images = torch.stack([self._jitter(x, epoch, i) for x, i in zip(images, indices, strict=True)])
        return self._erase(self._by_own(images, epoch, indices), epoch, indices)

    def _crop_and_flip(self, padded: Tensor, rows: Tensor, draws: np.ndarray) -> Tensor:
        if self.padding:
            offsets = to_device((draws[:, :2] * (2 * self.padding + 1)).astype(np.int64), padded.device)
            images = crop_all(padded, rows, offsets, self.size)
        else:
            images = padded[rows]
        if self.hflip:
            flipped = to_device(np.flatnonzero(draws[:, 2] < 0.5), images.device)
            images[flipped] = images[flipped].flip(3)
        return images

    def shapes(self, epoch: int, indices: np.ndarray) -> list[Shape]:
        """Return the transform to apply to each image during decoding, before `batch`."""
        if self.by_batch:
            return [val_shape(self.data)] * len(indices)
        draws = sample_draws(self.seed, epoch, indices, 3 + 2 * CROP_TRIES, CROP)
        policy_draws = sample_draws(self.seed, epoch, indices, NUM_DRAWS, POLICY)
        return [
            partial(self._one, epoch=epoch, index=i, draws=d, policy_draws=p)
            for i, d, p in zip(indices, draws, policy_draws, strict=True)
        ]

    def _one(
        self, image: Image.Image, epoch: int, index: int, draws: np.ndarray, policy_draws: np.ndarray
    ) -> np.ndarray:
        if self.config.crop:
            box = random_resized_box(
                *upright_size(image, self.decoding), draws, self.config.crop_scale, self.config.crop_ratio
            )
            interpolation = resolved_interpolation(self.data)
            image = decode_box(image, box, self.size, interpolation=interpolation, decoding=self.decoding)
        else:
            image = Image.fromarray(val_shape(self.data)(image))
        if self.hflip and draws[2] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.policy:
            image = self.policy.one(image, policy_draws)
        return np.asarray(self._jitter(image, epoch, index) if self.jitter else image)

    def _jitter(self, image: Any, epoch: int, index: int) -> Any:
        assert self.jitter is not None
        with sample_rng(self.seed, epoch, int(index)):
            return self.jitter(image)

    def _by_own(self, images: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        if self.own is None:
            return images
        return transform_all(self.own, str(self.config.target), images, self.seed, epoch, indices)

    def _erase(self, images: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        """Fill random rectangles (arXiv 1708.04896) with the mean colour, which becomes 0 after normalisation."""
        if not self.config.erasing_prob:
            return images
        draws = sample_draws(self.seed, epoch, indices, 5, ERASING)
        low, high = self.config.erasing_scale
        area = (low + draws[:, 1] * (high - low)) * self.size**2
        ratio = np.exp((2 * draws[:, 2] - 1) * math.log(3.3))  # 0.3 to 3.3 as in the paper, log-uniform
        sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).round().clip(1, self.size)
        sides *= draws[:, :1] < self.config.erasing_prob
        start = np.floor(draws[:, 3:] * (self.size - sides + 1))
        place = np.arange(self.size)
        inside = (place >= start[..., None]) & (place < (start + sides)[..., None])  # [B, 2, S]
        mask = to_device(inside[:, 0, :, None] & inside[:, 1, None, :], images.device)
        if self.mean.device != images.device:
            self.mean = self.mean.to(images.device)
        return torch.where(mask[:, None], self.mean, images)


def crop_all(padded: Tensor, rows: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Crop image `rows[i]` starting at row and column `offsets[i]`; return uint8 [B, 3, S, S]."""
    # One contiguous run of bytes is gathered per image, from the first pixel of the crop to the last, and strides skip
    # the pixels outside the crop. This is seven times as fast as one index per pixel.
    side = padded.shape[-1]
    step, run = 3 * side**2, 3 * side**2 - (side - size) * (side + 1)
    flat = padded.contiguous().view(-1)
    runs = flat.as_strided((len(flat) - run + 1, run), (1, 1)).index_select(
        0, rows * step + offsets[:, 0] * side + offsets[:, 1]
    )
    return runs.as_strided((len(rows), 3, size, size), (run, side**2, side, 1))


def random_resized_box(
    width: int, height: int, draws: np.ndarray, scale: Sequence[float], ratio: Sequence[float]
) -> Box:
    """Choose a crop box as torchvision's RandomResizedCrop does; after ten failed tries, use the largest central box.

    `draws` holds uniform random numbers: 3 for the position (one is unused) and 2 per try for area and aspect ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio in draws[3:].reshape(-1, 2):
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decode_box(
    image: Image.Image, box: Box, size: int, interpolation: str = "bilinear", decoding: Decoding = DEFAULT
) -> Image.Image:
    """Decode the region `box` of an upright image and resize it to size x size, in RGB.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box then still has at least `size` pixels.
    """
    full_width, full_height = upright_size(image, decoding)
    shrink = min(box[2] - box[0], box[3] - box[1]) // size
    if shrink >= 2 and image.format == "JPEG":
        shrink = 8 if shrink >= 8 else 4 if shrink >= 4 else 2
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
    rgb = to_rgb(image, decoding)
    x, y = rgb.width / full_width, rgb.height / full_height
    scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return rgb.resize((size, size), Image.Resampling[interpolation.upper()], box=scaled)


def val_shape(data: DataConfig) -> Shape:
    """Return the transform of val images that `data` configures."""
    return partial(
        fit,
        size=resolved_image_size(data),
        val_crop=data.val_crop,
        interpolation=resolved_interpolation(data),
        decoding=decoding_of(data),
    )


def fit(
    image: Image.Image,
    size: int,
    val_crop: float | None = None,
    interpolation: str = "bilinear",
    decoding: Decoding = DEFAULT,
) -> np.ndarray:
    """Resize the shorter side and crop the centre, as for validation; return uint8 [size, size, 3]."""
    return np.asarray(_fit_image(to_rgb(image, decoding), size, shorter_side(size, val_crop), interpolation))


def shorter_side(size: int, val_crop: float | None = None) -> int:
    """Return the length in pixels to which the shorter side is resized before the centre crop to `size`."""
    if size <= SMALL_IMAGE:
        return size
    # timm rounds down, so a val_crop taken from timm gives timm's pixels; our default has always been rounded up.
    return math.ceil(size / VAL_CROP) if val_crop is None else math.floor(size / val_crop)


def _fit_image(image: Image.Image, size: int, shorter: int, interpolation: str) -> Image.Image:
    image = _without_ends(image)
    if image.size != (size, size) or shorter != size:
        image = v2.functional.resize(image, [shorter], v2.InterpolationMode(interpolation), antialias=True)
        image = v2.functional.center_crop(image, [size, size])
    return image


def _without_ends(image: Image.Image) -> Image.Image:
    """Crop a very elongated image to an aspect ratio of at most MAX_ASPECT, keeping its centre."""
    # Without this, resizing an image of 1 x 100,000 pixels would take 20 GB.
    width, height = image.size
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


class Normalize:
    """Converts uint8 [B, 3, H, W] to float32 with mean 0 and std 1 per channel over the training images."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool):
        self.mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self.std = torch.tensor(std, device=device)[:, None, None] * 255
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)

    def undo(self, images: Tensor) -> Tensor:
        """Convert normalised images back to uint8 for display."""
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)
