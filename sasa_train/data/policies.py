"""Automatic augmentation policies: torchvision's operations and magnitudes, our own draws, whole batches at once.

Images that draw the same operation and magnitude are transformed together, so that a resident batch costs a few dozen
calls instead of one per image. A single Pillow image takes the same path.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config.keys import AugmentConfig

Operation = tuple[str, float]  # torchvision's name of it, and the magnitude
Chooser = Callable[[np.ndarray, int], list[Operation]]
NUM_DRAWS = 16  # per sample: eight operations of RandAugment
AUTO_POLICIES = {
    "auto_augment_imagenet": v2.AutoAugmentPolicy.IMAGENET,
    "auto_augment_cifar10": v2.AutoAugmentPolicy.CIFAR10,
    "auto_augment_svhn": v2.AutoAugmentPolicy.SVHN,
}


class Policy:
    """One of `augment.policy`, for square images.

    RandAugment (arXiv 1909.13719), TrivialAugment (2103.10158), AutoAugment (1805.09501), as torchvision has them.
    """

    # torchvision has no public names for what we use of its classes: _AUGMENTATION_SPACE, the operations with their
    # magnitudes by (bins, height, width) and whether they have a sign; _policies, AutoAugment's learned lists of
    # operations with probability and bin of the magnitude; and the call of one operation.

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

    def batch(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Transform uint8 [B, 3, S, S] by uniform numbers `draws` [B, NUM_DRAWS]."""
        chosen = [self.choose(row, images.shape[-1]) for row in draws]
        images = images.clone()
        for slot in range(max(len(operations) for operations in chosen)):
            groups: dict[Operation, list[int]] = {}
            for i, operations in enumerate(chosen):
                if slot < len(operations):
                    groups.setdefault(operations[slot], []).append(i)
            for operation, members in groups.items():
                where = to_device(np.array(members), images.device)
                images[where] = self._apply(images[where], operation)
        return images

    def one(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        for operation in self.choose(draws, image.size[0]):
            image = self._apply(image, operation)
        return image

    def _apply(self, image: Any, operation: Operation) -> Any:
        how = {"interpolation": self.transform.interpolation, "fill": self.transform._fill}
        return self.transform._apply_image_or_video_transform(image, *operation, **how)

    def _rand(self, draws: np.ndarray, size: int) -> list[Operation]:
        names, magnitude = list(self.transform._AUGMENTATION_SPACE), self.config.policy_magnitude
        pairs = draws[: 2 * self.config.policy_ops].reshape(-1, 2)
        return [self._signed(names[int(name * len(names))], magnitude, 31, sign, size) for name, sign in pairs]

    def _trivial(self, draws: np.ndarray, size: int) -> list[Operation]:
        names = list(self.transform._AUGMENTATION_SPACE)
        return [self._signed(names[int(draws[0] * len(names))], int(draws[1] * 31), 31, draws[2], size)]

    def _auto(self, draws: np.ndarray, size: int) -> list[Operation]:
        policies = self.transform._policies
        policy = policies[int(draws[0] * len(policies))]
        return [
            self._signed(name, magnitude_bin, 10, draws[2 * i + 2], size)
            for i, (name, probability, magnitude_bin) in enumerate(policy)
            if draws[2 * i + 1] <= probability
        ]

    def _signed(self, name: str, magnitude_bin: int, num_bins: int, sign: float, size: int) -> Operation:
        magnitudes_of, is_signed = self.transform._AUGMENTATION_SPACE[name]
        magnitudes = magnitudes_of(num_bins, size, size)
        if magnitudes is None:
            return name, 0.0
        magnitude = float(magnitudes[magnitude_bin])
        return name, -magnitude if is_signed and sign <= 0.5 else magnitude


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device, without waiting for it where it is CUDA."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
