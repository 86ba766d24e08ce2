"""Automatic augmentation policies for whole batches, with torchvision's operations and this project's random draws.

A batch is sorted by operation, and all images with the same operation are transformed at once, even if their magnitudes
differ. This takes a few device calls per operation, none of which synchronises with the device. The results are
bit-identical to those of torchvision's own calls. A single Pillow image is transformed by torchvision itself.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config.keys import AugmentConfig

Operation = tuple[str, float]  # torchvision's name for the operation, and its magnitude
Size = tuple[int, int]  # height and width in pixels
Chooser = Callable[[np.ndarray, Size], list[Operation]]
NUM_DRAWS = 16  # per sample, enough for eight operations of RandAugment
NUM_PARAMETERS = 6  # per operation and image
AUTO_POLICIES = {
    "auto_augment_imagenet": v2.AutoAugmentPolicy.IMAGENET,
    "auto_augment_cifar10": v2.AutoAugmentPolicy.CIFAR10,
    "auto_augment_svhn": v2.AutoAugmentPolicy.SVHN,
}


class Policy:
    """The policy that `augment.policy` selects, for images of any shape.

    RandAugment (arXiv 1909.13719), TrivialAugment (2103.10158) and AutoAugment (1805.09501) work as in torchvision.
    """

    def __init__(self, config: AugmentConfig):
        self.config = config
        self.transform: Any
        self.choose: Chooser
        if config.policy == "rand_augment":
            self.transform, self.choose = v2.RandAugment(config.policy_ops, config.policy_magnitude), self._rand
        elif config.policy == "trivial_augment":
            self.transform, self.choose = v2.TrivialAugmentWide(), self._trivial
        else:
            self.transform, self.choose = v2.AutoAugment(AUTO_POLICIES[config.policy]), self._auto
        self._tables: dict[tuple[int, Size], dict[str, list[float] | None]] = {}  # (bins, size) -> name -> magnitudes

    def batch(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Transform a uint8 batch [B, C, H, W], given uniform random numbers `draws` [B, NUM_DRAWS]."""
        (height, width), images = images.shape[-2:], images.clone()
        chosen = [self.choose(row, (height, width)) for row in draws]
        for slot in range(max(len(operations) for operations in chosen)):
            members = [i for i, operations in enumerate(chosen) if slot < len(operations)]
            members.sort(key=lambda i: chosen[i][slot][0])
            rows = to_device(np.array(members), images.device)
            images[rows] = apply_all([chosen[i][slot] for i in members], images[rows])
        return images

    def one(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """Transform a single image, given uniform random numbers `draws` [NUM_DRAWS]."""
        for name, magnitude in self.choose(draws, (image.height, image.width)):
            image = apply_operation(self.transform, image, name, magnitude)
        return image

    def _rand(self, draws: np.ndarray, size: Size) -> list[Operation]:
        names, magnitude = list(table_of(self.transform)), self.config.policy_magnitude
        pairs = draws[: 2 * self.config.policy_ops].reshape(-1, 2)
        return [self._signed(names[int(name * len(names))], magnitude, 31, sign, size) for name, sign in pairs]

    def _trivial(self, draws: np.ndarray, size: Size) -> list[Operation]:
        names = list(table_of(self.transform))
        return [self._signed(names[int(draws[0] * len(names))], int(draws[1] * 31), 31, draws[2], size)]

    def _auto(self, draws: np.ndarray, size: Size) -> list[Operation]:
        policies = policies_of(self.transform)
        policy = policies[int(draws[0] * len(policies))]
        return [
            self._signed(name, magnitude_bin, 10, draws[2 * i + 2], size)
            for i, (name, probability, magnitude_bin) in enumerate(policy)
            if draws[2 * i + 1] <= probability
        ]

    def _signed(self, name: str, magnitude_bin: int, num_bins: int, sign: float, size: Size) -> Operation:
        table = table_of(self.transform)
        if (num_bins, size) not in self._tables:
            found = {key: magnitudes_of(num_bins, *size) for key, (magnitudes_of, _) in table.items()}
            self._tables[num_bins, size] = {key: x if x is None else x.tolist() for key, x in found.items()}
        magnitudes = self._tables[num_bins, size][name]
        if magnitudes is None:
            return name, 0.0
        magnitude = float(magnitudes[magnitude_bin])
        return name, -magnitude if table[name][1] and sign <= 0.5 else magnitude


def table_of(transform: Any) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Return a dict that maps the name of each of torchvision's operations to a pair.

    The first entry is a function of (bins, height, width) that returns the operation's magnitudes; the second tells
    whether they are signed.
    """
    return transform._AUGMENTATION_SPACE


def policies_of(auto_augment: Any) -> list[tuple[tuple[str, float, Any], ...]]:
    """Return AutoAugment's learned policies, each a list of operations with their probabilities and magnitude bins."""
    return auto_augment._policies


def apply_operation(transform: Any, image: Any, name: str, magnitude: float) -> Any:
    """Apply one operation to an image with torchvision's own function."""
    how = {"interpolation": transform.interpolation, "fill": transform._fill}
    return transform._apply_image_or_video_transform(image, name, magnitude, **how)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device; the copy is asynchronous on CUDA."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def apply_all(operations: list[Operation], images: Tensor) -> Tensor:
    """Apply one operation to each image of a uint8 batch [B, C, H, W]; the operations must be sorted by name."""
    found = np.array([parameters_of(name, magnitude, tuple(images.shape[-2:])) for name, magnitude in operations])
    parameters = to_device(found, images.device)
    counts = {name: len(list(group)) for name, group in groupby(name for name, _ in operations)}
    parts = zip(counts, images.split([*counts.values()]), parameters.split([*counts.values()]), strict=True)
    return torch.cat([OPERATIONS[name](part, numbers) for name, part, numbers in parts])


@cache
def parameters_of(name: str, magnitude: float, size: Size) -> np.ndarray:
    """Return an operation's parameters for an image of `size`, float32 [NUM_PARAMETERS].

    For geometric operations, these are the map from output to input positions, [3, 2], in units of half the image size;
    for Posterize, the mask of the bits to keep; for Solarize, the threshold; for all others, the factor and 1 minus it.
    """
    # The values are computed in Python floats and rounded once, as in torchvision; otherwise pixels would differ.
    found = np.zeros(NUM_PARAMETERS, dtype=np.float32)
    if name in GEOMETRIC:
        found[:] = inverse_map(name, magnitude, size)
        half = np.array([[0.5 * size[1]], [0.5 * size[0]]], dtype=np.float32)  # of x and y
        found = (found.reshape(2, 3) / half).T.ravel()
    elif name == "Posterize":
        found[0] = 256 - 2 ** (8 - int(magnitude))
    elif name == "Solarize":
        found[0] = 255 * magnitude
    else:
        found[:2] = 1.0 + magnitude, 1.0 - (1.0 + magnitude)
    return found


def inverse_map(name: str, magnitude: float, size: Size) -> list[float]:
    """Return the affine map from output to input pixels, [2, 3] in row-major order, relative to the image's centre."""
    if name == "Rotate":
        angle = math.radians(-(magnitude % 360))
        return [math.cos(angle), math.sin(angle), 0.0, -math.sin(angle), math.cos(angle), 0.0]
    if name in ("TranslateX", "TranslateY"):
        shift = -float(int(magnitude))
        return [1.0, 0.0, shift, 0.0, 1.0, 0.0] if name == "TranslateX" else [1.0, 0.0, 0.0, 0.0, 1.0, shift]
    # Shears do not move the first row or column of the image.
    shear = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    if name == "ShearX":
        return [1.0, shear, shear * 0.5 * size[0], 0.0, 1.0, 0.0]
    return [1.0, 0.0, 0.0, shear, 1.0, shear * 0.5 * size[1]]


@cache
def positions_of(size: Size, device: torch.device) -> Tensor:
    """Return the position (x, y, 1) of each pixel relative to the image's centre, [1, H*W, 3]."""
    lines = [torch.linspace((1.0 - n) * 0.5, (n - 1.0) * 0.5, n, device=device) for n in size]
    y, x = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3)


def warp(images: Tensor, parameters: Tensor) -> Tensor:
    """Warp each image with its own map and nearest-neighbour sampling; pixels from outside the image are black."""
    height, width = images.shape[-2:]
    positions = positions_of((height, width), images.device).expand(len(images), -1, -1)
    grid = positions.bmm(parameters.view(-1, 3, 2)).view(-1, height, width, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def blend(images: Tensor, others: Tensor, parameters: Tensor) -> Tensor:
    """Return factor * image + (1 - factor) * other for each pair of images."""
    factor, rest = parameters[:, :2].T[..., None, None, None]
    # addcmul rounds once or twice depending on the processor, exactly as torchvision's add_(other, alpha=...) does.
    return torch.addcmul(images * factor, others, rest).clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    return v2.functional.rgb_to_grayscale(images).float()


def saturate(images: Tensor, parameters: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else blend(images, grey(images), parameters)


@cache
def smoothing_kernel(device: torch.device, channels: int) -> Tensor:
    """Return Pillow's 3x3 smoothing kernel, repeated for each channel."""
    kernel = torch.full((3, 3), 1.0 / 13.0, device=device)
    kernel[1, 1].fill_(5.0 / 13.0)
    return kernel.expand(channels, 1, 3, 3)


def sharpen(images: Tensor, parameters: Tensor) -> Tensor:
    """Blend each image with a smoothed copy; border pixels remain unchanged."""
    if min(images.shape[-2:]) <= 2:
        return images
    out, channels = images.float(), images.shape[1]
    kernel = smoothing_kernel(images.device, channels)
    smooth, inside = F.conv2d(out, kernel, groups=channels).round_(), out[..., 1:-1, 1:-1]
    inside.addcmul_(smooth.sub_(inside), first_of(parameters[:, 1:]))
    return out.clamp_(0, 255).to(torch.uint8)


def first_of(parameters: Tensor) -> Tensor:
    """Return the first parameter of each image, [B, 1, 1, 1]."""
    return parameters[:, :1, None, None]


GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(GEOMETRIC, warp),
    "Identity": lambda images, _: images,
    "Brightness": lambda images, numbers: (images * first_of(numbers)).clamp_(0, 255).to(torch.uint8),
    "Color": saturate,
    "Contrast": lambda images, numbers: blend(images, grey(images).mean((1, 2, 3), keepdim=True), numbers),
    "Sharpness": sharpen,
    "Posterize": lambda images, numbers: images & first_of(numbers).to(torch.uint8),
    "Solarize": lambda images, numbers: torch.where(images >= first_of(numbers), 255 - images, images),
    "AutoContrast": lambda images, _: v2.functional.autocontrast(images),
    "Equalize": lambda images, _: v2.functional.equalize(images),
    "Invert": lambda images, _: v2.functional.invert(images),
}
