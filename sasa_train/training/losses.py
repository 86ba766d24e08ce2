"""Training losses, for labels as they are and for labels that mixup or cutmix mixed."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from sasa_train.config.keys import TrainerConfig


def build_criterion(config: TrainerConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss of float32 logits and labels, which are int64 [B] or, mixed, float32 [B, num_classes]."""
    if config.loss == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return partial(binary_cross_entropy, label_smoothing=config.label_smoothing)


def binary_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """A sigmoid a class, averaged over classes and images, after "ResNet strikes back" (arXiv 2110.00476).

    Smoothed as cross-entropy is, mixed labels too, and these keep their shares. (timm's class smooths labels that are
    not mixed alone, and can make each mixed class a 1.)
    """
    if labels.ndim == 1:
        labels = nn.functional.one_hot(labels, logits.shape[1])
    labels = labels * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
