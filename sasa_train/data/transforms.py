"""Transforms from an image on disk to the model's input; images are normalised on the device and stay uint8 until then.

In grey16, they are float32 with whole numbers up to 65,535 or, once they are resized, fractions of them, because torch
has few operations for uint16.

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
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config.derived import (
    at_train_size,
    at_val_size,
    crops_by_padding,
    flips_images,
    resolved_interpolation,
    resolved_size,
)
from sasa_train.config.keys import SMALL_IMAGE, AugmentConfig, DataConfig
from sasa_train.data.decoding import DEFAULT, WHITE, Decoding, decode, decoding_of, upright_size
from sasa_train.data.own_transform import load_transform, transform_all
from sasa_train.data.policies import NUM_DRAWS, Policy, to_device
from sasa_train.data.randomness import CROP, ERASING, POLICY, sample_draws, sample_rng
from sasa_train.data.whole import segments

VAL_CROP = 0.875  # default of data.val_crop: a 224-pixel crop from a shorter side of 256
MAX_ASPECT = 64  # of an image before its centre crop; the ends of longer images are cut off
CROP_TRIES = 10  # for the random-resized crop, as in torchvision
Shape = Callable[[Image.Image], np.ndarray]  # an image, not decoded yet -> pixels [H, W, C]
Size = tuple[int, int]  # height and width in pixels
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
LOSSLESS = 0xC3  # the marker before the pixels of a lossless JPEG (SOF3)


class Augment:
    """A config's training transforms for images of `size`; all randomness depends on (seed, epoch, index).

    Raises:
        ConfigError: the user's own transform (`augment.target`) cannot be imported.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, seed: int, mean: Sequence[float]):
        self.data, self.config, self.size, self.seed = at_train_size(data), augment, resolved_size(data), seed
        self.decoding = decoding_of(data)
        self.by_batch = crops_by_padding(data, augment)
        padding = augment.crop_padding if augment.crop_padding is not None else min(self.size) // 8
        self.padding = padding if augment.crop else 0
        self.hflip = flips_images(data, augment)
        self.policy = Policy(augment) if augment.policy != "none" else None
        strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
        self.jitter = v2.ColorJitter(*strengths) if any(strengths) else None
        self.own = load_transform(augment)
        self.mean = torch.tensor(mean).mul(WHITE[data.mode]).round().to(pixel_type(data))[:, None, None]

    def pad(self, images: Tensor) -> Tensor:
        """Pad images [B, C, H, W] with zeros if `batch` will crop them."""
        return F.pad(images, [self.padding] * 4) if self.by_batch and self.padding else images

    def batch(self, padded: Tensor, where: np.ndarray, epoch: int, indices: np.ndarray) -> Tensor:
        """Augment rows `where` of `padded`, which are images `indices` of the data set; return [B, C, H, W]."""
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
            image = fit_image(image, **_val_keys(self.data))
        if self.hflip and draws[2] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.policy:
            image = self.policy.one(image, policy_draws)
        return pixels_of(self._jitter(image, epoch, index) if self.jitter else image)

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
        height, width = self.size
        area = (low + draws[:, 1] * (high - low)) * (height * width)
        ratio = np.exp((2 * draws[:, 2] - 1) * math.log(3.3))  # 0.3 to 3.3 as in the paper, log-uniform
        sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).round().clip(1, self.size)
        sides *= draws[:, :1] < self.config.erasing_prob
        start = np.floor(draws[:, 3:] * (self.size - sides + 1))
        rows, columns = (
            (place >= start[:, axis, None]) & (place < (start + sides)[:, axis, None])
            for axis, place in enumerate((np.arange(height), np.arange(width)))
        )
        mask = to_device(rows[:, :, None] & columns[:, None, :], images.device)
        if self.mean.device != images.device:
            self.mean = self.mean.to(images.device)
        return torch.where(mask[:, None], self.mean, images)


def crop_all(padded: Tensor, rows: Tensor, offsets: Tensor, size: Size) -> Tensor:
    """Crop image `rows[i]` starting at row and column `offsets[i]`; return [B, C, H, W]."""
    # One contiguous run of bytes is gathered per image, from the first pixel of the crop to the last, and strides skip
    # the pixels outside the crop. This is seven times as fast as one index per pixel.
    (channels, height, width), (kept_height, kept_width) = padded.shape[1:], size
    step = channels * height * width
    run = step - (height - kept_height) * width - (width - kept_width)
    flat = padded.contiguous().view(-1)
    runs = flat.as_strided((len(flat) - run + 1, run), (1, 1)).index_select(
        0, rows * step + offsets[:, 0] * width + offsets[:, 1]
    )
    return runs.as_strided((len(rows), channels, *size), (run, height * width, width, 1))


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
    image: Image.Image, box: Box, size: Size, interpolation: str = "bilinear", decoding: Decoding = DEFAULT
) -> Image.Image:
    """Decode the region `box` of an upright image and resize it to `size`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box then still has at least the pixels of `size`.
    """
    full_width, full_height = upright_size(image, decoding)
    height, width = size
    shrink = min((box[2] - box[0]) // width, (box[3] - box[1]) // height)
    if shrink >= 2 and image.format == "JPEG" and not _is_lossless(image):
        shrink = 8 if shrink >= 8 else 4 if shrink >= 4 else 2
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
    decoded = decode(image, decoding)
    x, y = decoded.width / full_width, decoded.height / full_height
    scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return decoded.resize((width, height), Image.Resampling[interpolation.upper()], box=scaled)


def _is_lossless(image: Image.Image) -> bool:
    """Whether a JPEG that has been opened is one of the lossless kind, which is not decoded at a part of its size."""
    assert isinstance(image, ImageFile.ImageFile) and image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(place)
    image.fp.seek(place)
    return any(marker == LOSSLESS for marker, _ in segments(head))


def pixel_type(data: DataConfig) -> torch.dtype:
    """Return the type of pixels before they are normalised."""
    return torch.float32 if data.mode == "grey16" else torch.uint8


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return a decoded image as [H, W, C], uint8 or, in grey16, float32 from 0 to 65,535."""
    pixels = np.asarray(image)
    if image.mode == "F":  # Pillow does not clip floats that a resizing filter has overshot
        pixels = pixels.clip(0, WHITE["grey16"])
    return pixels if pixels.ndim == 3 else pixels[..., None]


def as_shown(images: Tensor) -> Tensor:
    """Convert images [..., C, H, W] that are not normalised to uint8 RGB, [..., 3, H, W], for display."""
    if images.dtype != torch.uint8:
        images = (images * (255 / WHITE["grey16"])).round().clamp(0, 255).to(torch.uint8)
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def val_shape(data: DataConfig) -> Shape:
    """Return the transform of val images that `data` configures."""
    return partial(fit, **_val_keys(at_val_size(data)))


def _val_keys(data: DataConfig) -> dict[str, Any]:
    return {
        "size": resolved_size(data),
        "val_crop": data.val_crop,
        "interpolation": resolved_interpolation(data),
        "decoding": decoding_of(data),
    }


def fit(
    image: Image.Image,
    size: Size,
    val_crop: float | None = None,
    interpolation: str = "bilinear",
    decoding: Decoding = DEFAULT,
) -> np.ndarray:
    """Resize to the least size that covers `covered_size` and crop the centre, as for validation; see `pixels_of`."""
    return pixels_of(fit_image(image, size, val_crop, interpolation, decoding))


def fit_image(
    image: Image.Image, size: Size, val_crop: float | None, interpolation: str, decoding: Decoding
) -> Image.Image:
    """Do the same, and return an image in Pillow's mode RGB, L or, for grey16, F."""
    return _fit_image(decode(image, decoding), size, covered_size(size, val_crop), interpolation)


def covered_size(size: Size, val_crop: float | None = None) -> Size:
    """Return the height and width that a resized image has to cover before the centre crop to `size`.

    For square sizes, this is the length of the image's shorter side.
    """
    height, width = size
    if max(size) <= SMALL_IMAGE:
        return size
    # timm rounds down, so a val_crop taken from timm gives timm's pixels; our default has always been rounded up for
    # square sizes.
    if val_crop is None and height == width:
        return (math.ceil(height / VAL_CROP),) * 2
    crop = val_crop or VAL_CROP
    return math.floor(height / crop), math.floor(width / crop)


def _fit_image(image: Image.Image, size: Size, covered: Size, interpolation: str) -> Image.Image:
    image = _without_ends(image)
    if (image.height, image.width) != size or covered != size:
        # One number is the length of the shorter side. Other shapes are resized as in timm's ResizeKeepRatio.
        ratio = min(image.height / covered[0], image.width / covered[1])
        is_square = covered[0] == covered[1]
        to = [covered[0]] if is_square else [round(image.height / ratio), round(image.width / ratio)]
        image = v2.functional.resize(image, to, v2.InterpolationMode(interpolation), antialias=True)
        image = v2.functional.center_crop(image, list(size))
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
    """Converts pixels [B, C, H, W] to float32 with mean 0 and std 1 per channel over the training images.

    white: the value of a white pixel, which is 65,535 in grey16.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        channels_last: bool,
        white: int = WHITE["rgb"],
    ):
        self.mean = torch.tensor(mean, device=device)[:, None, None] * white
        self.std = torch.tensor(std, device=device)[:, None, None] * white
        self.white = white
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        # A copy, because images in grey16 are float32 already, and the caller's must not change.
        images = images.to(torch.float32, memory_format=self.memory_format, copy=True)
        return images.sub_(self.mean).div_(self.std)

    def undo(self, images: Tensor) -> Tensor:
        """Convert normalised images back to uint8 RGB for display."""
        images = images * self.std + self.mean
        return as_shown(images if self.white == WHITE["grey16"] else images.round().clamp(0, 255).to(torch.uint8))
