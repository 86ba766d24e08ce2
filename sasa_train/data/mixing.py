"""Mixup and cutmix: whole micro-batches, on the device, random by (seed, step) alone."""

import torch
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config import AugmentConfig
from sasa_train.data.randomness import batch_rng


class Mixing:
    """Mixes each image with its neighbour in the micro-batch, and their labels (arXiv 1710.09412, 1905.04899).

    Every choice is made on the CPU's generator, so it is the same on any device. `last_step` is the first step that is
    not mixed any more, for `augment.mix_off_epochs`.
    """

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int, last_step: int):
        self.config, self.seed, self.last_step = config, seed, last_step
        self.mixup = v2.MixUp(alpha=config.mixup, num_classes=num_classes) if config.mixup else None
        self.cutmix = v2.CutMix(alpha=config.cutmix, num_classes=num_classes) if config.cutmix else None

    def __call__(self, images: Tensor, labels: Tensor, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] and int64 [B] -> images and float [B, num_classes], or both as they were."""
        if step >= self.last_step:
            return images, labels
        with batch_rng(self.seed, step, micro_batch):
            is_mixed, is_cut = torch.rand(2) < torch.tensor([self.config.mix_prob, self.config.mix_switch_prob])
            mix = self.cutmix if self.mixup is None or (self.cutmix is not None and is_cut) else self.mixup
            return mix(images, labels) if is_mixed and mix is not None else (images, labels)
