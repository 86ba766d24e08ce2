"""Mixup and cutmix, applied to whole micro-batches on the device; the randomness depends only on (seed, step)."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from sasa_train.config.keys import AugmentConfig
from sasa_train.data.randomness import batch_rng


class Mixing:
    """Mixes each image and its label with those of its neighbour in the micro-batch (arXiv 1710.09412, 1905.04899).

    All random numbers come from the CPU's generator, so they are the same on any device. Mixing stops at step
    `last_step` (`augment.mix_off_epochs`).
    """

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int, last_step: int):
        self.config, self.num_classes, self.seed, self.last_step = config, num_classes, seed, last_step
        kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        self.mixes = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in kinds if alpha]

    def __call__(self, images: Tensor, labels: Tensor, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and labels, mixed (float labels [B, num_classes]) or unchanged (int64 [B])."""
        if step >= self.last_step or not self.mixes:
            return images, labels
        mix, numbers = self.draw(images, step, micro_batch)
        if mix is None:
            return images, labels
        # torch's one_hot checks the range of the labels, which would synchronise with a CUDA device.
        one_hot = images.new_zeros(len(labels), self.num_classes, dtype=torch.float32)
        one_hot.scatter_(1, labels[:, None], 1.0)
        numbers |= {"labels": one_hot, "batch_size": len(labels)}
        return mix.transform(images, numbers), mix.transform(one_hot, numbers)

    def draw(self, images: Tensor, step: int, micro_batch: int) -> tuple[v2.Transform | None, dict[str, Any]]:
        """Choose the transform for a micro-batch (or None to leave it unmixed) and draw its parameters."""
        with batch_rng(self.seed, step, micro_batch):
            is_mixed, is_cut = torch.rand(2) < torch.tensor([self.config.mix_prob, self.config.mix_switch_prob])
            mix = self.mixes[-1 if is_cut else 0]
            return (mix, mix.make_params([images])) if is_mixed else (None, {})
