"""A pass of a trained model over val, which yields the metrics in the training log and the output for each image."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sasa_train.config.derived import micro_batch_size
from sasa_train.data.datasets import ImageSet
from sasa_train.data.fingerprint import fingerprint
from sasa_train.data.loader import Loader, build_eval_loader, check_evaluated
from sasa_train.device import resolve
from sasa_train.terminal import some
from sasa_train.trained import TrainedModel
from sasa_train.training.evaluation import Evaluation, evaluate, rank_classes


@dataclass
class Answers:
    """A model's outputs for the n readable val images, on the CPU.

    `logits`, float32 [n, num_classes] (200 MB for ImageNet), come from a single view or are the logarithm of the mean
    probabilities over views. `ranked`, int64 [n, 5] (or fewer if there are fewer classes), lists the top classes, best
    first. `labels`, int64 [n], are the true classes, and `indices`, int64 [n], the images' positions in the data set.
    """

    logits: Tensor
    ranked: Tensor
    labels: Tensor
    indices: np.ndarray

    @property
    def predictions(self) -> Tensor:
        return self.ranked[:, 0]

    @property
    def top1(self) -> float:
        return 100 * (self.predictions == self.labels).double().mean().item()

    @property
    def top5(self) -> float:
        return 100 * (self.ranked == self.labels[:, None]).any(1).double().mean().item()

    def rows(self, which: np.ndarray) -> "Answers":
        return Answers(self.logits[which], self.ranked[which], self.labels[which], self.indices[which])


@dataclass
class Val:
    """A trained model on its device, with its val images, which have not been read yet."""

    trained: TrainedModel
    device: torch.device
    loader: Loader
    images: ImageSet
    precision: str

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.images)

    def images_missing(self, result: Evaluation) -> str:
        """Name the classes of which val has no images."""
        counts = zip(self.images.classes, result.class_images, strict=True)
        missing = [name for name, num_images in counts if not num_images]
        return some(missing) if missing else ""

    def evaluate(self, answering: "Answering | None" = None) -> Evaluation:
        """Return exactly the metrics that training logs; if `answering` is given, it records the model's outputs.

        Raises:
            ExpectedFailure: the loss is not finite, because the model has diverged.
        """
        model, num_classes = answering or self.trained.model, len(self.images.classes)
        try:
            result = evaluate(model, self.loader.eval_batches(), num_classes, self.device, self.precision)
        finally:
            self.loader.close()
        assert result is not None
        if not math.isfinite(result.loss):
            raise self.trained.diverged(self.precision, f"the loss on val is {result.loss}")
        check_evaluated(self.loader, result.num_images, self.loader.num_left_out)
        return result

    def evaluate_keeping_answers(self, with_mirrored: bool = False) -> tuple[Evaluation, Answers]:
        """Return the result of `evaluate` and the answers, optionally averaged over each image and its mirror image."""
        answering = Answering(self.trained.model, with_mirrored)
        result = self.evaluate(answering)
        unreadable = self.loader.quarantine.found
        readable = [i for i in range(len(self.images)) if self.images.name(i) not in unreadable]
        indices = np.array(readable, dtype=np.int64)
        logits, ranked = torch.cat(answering.logits), torch.cat(answering.ranked)
        if logits.isnan().any():
            raise self.trained.diverged(self.precision, "an output for a mirrored image is NaN")
        if len(logits) != len(indices):
            raise RuntimeError(f"{len(logits):,} images were evaluated, but {len(indices):,} could be read")
        return result, Answers(logits, ranked, torch.from_numpy(self.images.labels[indices]), indices)


class Answering(nn.Module):
    """A wrapper that records a model's logits or, with mirrored views, the average over both views."""

    def __init__(self, model: nn.Module, with_mirrored: bool):
        super().__init__()
        self.model, self.with_mirrored = model, with_mirrored
        self.logits: list[Tensor] = []
        self.ranked: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        plain = self.model(images)
        kept = plain.float()
        if self.with_mirrored:
            kept = mean_over_views([kept, self.model(images.flip(3)).float()])
        self.logits.append(kept.cpu())
        self.ranked.append(rank_classes(kept).cpu())
        return plain


def mean_over_views(logits: list[Tensor]) -> Tensor:
    """Return the logarithm of the probabilities averaged over views; its softmax is that average."""
    return torch.stack([view.log_softmax(1) for view in logits]).logsumexp(0) - math.log(len(logits))


def open_val(trained: TrainedModel) -> Val:
    """Load val with the same batches as in training, and move the model to the device.

    Raises:
        ConfigError: the data set is invalid, or holds a class that is not the checkpoint's.
    """
    checkpoint, config = trained.checkpoint, trained.config
    config.trainer.sync_batch_norm = False  # only used in training
    if config.trainer.micro_batch_size is None:  # use the per-process batches of the training run
        num_processes = checkpoint["provenance"].get("world_size", 1)
        config.trainer.micro_batch_size = micro_batch_size(config.trainer, num_processes)
        config.trainer.grad_accum_steps = 1
    trained.check_places()
    device, config = resolve(config)
    loader, images = build_eval_loader(config, device, trained.classes)
    trained.model.to(device).to(memory_format=loader.normalize.memory_format)
    return Val(trained, device, loader, images, config.trainer.precision)
