"""Losses for classes of unequal frequency or difficulty: class weights and the focal loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sasa_train.processes import collectives


def focal_loss(logits: Tensor, labels: Tensor, gamma: float, label_smoothing: float) -> Tensor:
    """Compute the focal loss of each image (arXiv 1708.02002), for softmax: the sum of -label (1 - p)^gamma log(p).

    logits: float32 [B, num_classes]; labels: int64 [B], or float32 [B, num_classes] if mixed. Returns [B].
    """
    if labels.ndim == 1:
        labels = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
    labels = labels * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    log_p = logits.log_softmax(1)
    # 1 - p without cancellation; at 0, the gradient of a power below 1 would be infinite.
    others = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(labels * others**gamma * log_p).sum(1)


class WeightedLoss:
    """A mean of the images' losses times their weights, with a sum of the weights since `factor` was last called.

    loss: returns the loss of each image, [B].
    weights: one per class, [num_classes]; the weight of an image is their mean over its (mixed) label.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], weights: Tensor):
        self.loss, self.weights = loss, weights
        self.total = weights.new_zeros(())

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        of_images = self.of_images(labels)
        self.total = self.total + of_images.detach().sum()
        return (of_images * self.loss(logits, labels)).mean()

    def of_images(self, labels: Tensor) -> Tensor:
        """Return the weights of images by their labels, [B]."""
        # Not a matrix product, which autocast would round.
        return self.weights[labels] if labels.ndim == 1 else (labels * self.weights).sum(1)

    def factor(self, num_images: int) -> Tensor:
        """Return `num_images` over the sum of their weights in all processes, without waiting for the device.

        This turns the sum of losses times weights over `num_images` into the weighted mean of a global batch.
        """
        total, self.total = self.total, torch.zeros_like(self.total)
        return num_images / collectives.sum_everywhere(total)


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor)
