"""Evaluate a model (loss, top1, top5 and confusion matrix), optionally after recomputing batch norm's statistics.

Under torchrun, each process evaluates its share of the images, and the results cover all of them.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sasa_train.device import autocast
from sasa_train.processes import collectives

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class Evaluation:
    """Metrics that count each image once: the mean cross-entropy, and top1 and top5 in percent.

    `confusion`, int64 [num_classes, num_classes], counts images by label (row) and prediction (column).
    """

    loss: float
    top1: float
    top5: float
    num_images: int
    confusion: Tensor = field(repr=False)

    @property
    def f1_macro(self) -> float:
        """The mean of the classes' F1, in percent, as scikit-learn's f1_score(average="macro", labels=THOSE_IN_VAL)."""
        return _mean(scores.f1 for scores in self.by_class)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the classes' recall, in percent, as scikit-learn's balanced_accuracy_score."""
        return _mean(scores.recall for scores in self.by_class)

    @property
    def by_class(self) -> list["ClassScores"]:
        hits, images, predicted = self.class_hits, self.class_images, self.confusion.sum(0).tolist()
        return [ClassScores.of(*counts) for counts in zip(hits, images, predicted, strict=True)]

    @property
    def class_hits(self) -> list[int]:
        return self.confusion.diagonal().tolist()

    @property
    def class_images(self) -> list[int]:
        return self.confusion.sum(1).tolist()


class ClassScores(NamedTuple):
    """A class's scores in percent; None without images of it. No prediction of it is a precision of 0."""

    precision: float | None
    recall: float | None
    f1: float | None

    @staticmethod
    def of(hits: int, images: int, predicted: int) -> "ClassScores":
        if not images:
            return ClassScores(None, None, None)
        return ClassScores(100 * hits / max(predicted, 1), 100 * hits / images, 100 * 2 * hits / (images + predicted))


def _mean(scores: Iterable[float | None]) -> float:
    """Return the mean over the classes that have images."""
    return statistics.fmean(score for score in scores if score is not None)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    num_classes: int,
    device: torch.device,
    precision: str,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate `model` in eval mode over `batches`; return None if `stop_requested()` becomes true meanwhile.

    Each process passes its share of the batches, which may be empty, and receives the metrics over all batches.
    """
    # The model is never compiled here, so that the metrics do not depend on `trainer.compile`.
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, top5 hits
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    is_stopped = False
    for images, labels in batches:
        if is_stopped := stop_requested():
            break
        with autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        ranked = rank_classes(logits)
        is_ranked = (ranked == labels[:, None]).any(1)
        sums += torch.stack([losses.double().sum(), is_ranked.sum().double()])
        confusion.index_add_(0, labels * num_classes + ranked[:, 0], torch.ones_like(labels))
    if collectives.largest(is_stopped):
        return None
    sums, confusion = collectives.total(sums), collectives.total(confusion).view(num_classes, num_classes).cpu()
    num_images = int(confusion.sum())
    loss, top5_hits = (sums / num_images).tolist()
    top1 = 100 * int(confusion.diagonal().sum()) / num_images
    return Evaluation(loss, top1, 100 * top5_hits, num_images, confusion)


def rank_classes(logits: Tensor) -> Tensor:
    """Return the classes with the largest logits, int64 [B, min(5, num_classes)]; the first is the prediction."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def batch_norms(model: nn.Module) -> list[Any]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in model.modules() if isinstance(module, kinds)]


def recalibrate(model: nn.Module, batches: Batches, device: torch.device) -> None:
    """Replace batch norm's running statistics with the plain average over `batches` (arXiv 1803.05407, section 3.2).

    All processes must pass the same number of batches, and all receive the average over all batches.
    """
    update_bn(batches, model, device)
    for norm in batch_norms(model):
        for buffer in (norm.running_mean, norm.running_var):
            if buffer is not None:
                collectives.average(buffer)
