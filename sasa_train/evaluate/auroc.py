"""The area under the ROC curve (AUROC) of each class against the rest."""

import statistics

from torch import Tensor


def class_aurocs(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Return each class's AUROC in percent, by scikit-learn; None for a class that has all of the images, or none.

    It is the probability that the model gives an image of the class a higher probability of it than another image.

    logits: float32 [n, num_classes], labels: int64 [n].
    """
    from sklearn.metrics import roc_auc_score

    probabilities, found = logits.double().softmax(1).numpy(), list[float | None]()
    for number in range(logits.shape[1]):
        is_class = (labels == number).numpy()
        has_both = 0 < is_class.sum() < len(is_class)
        found.append(100 * float(roc_auc_score(is_class, probabilities[:, number])) if has_both else None)
    return found


def mean_auroc(found: list[float | None]) -> float | None:
    """Return the mean over the classes that have an AUROC, or None if none has."""
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None
