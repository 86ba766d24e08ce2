"""The weights of the classes in the training loss (`trainer.class_weights`), from names or from the train labels."""

from collections.abc import Sequence

import numpy as np

from sasa_train.config.keys import CLASS_WEIGHTS, TrainerConfig
from sasa_train.data.class_names import composed, with_nearest
from sasa_train.data.datasets import ImageSet
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable, some


def check_weighted(trainer: TrainerConfig, classes: Sequence[str]) -> None:
    """Raise ConfigError if `trainer.class_weights` names a class that is not among `classes`."""
    known = composed(classes)
    named = composed(list(trainer.class_weights)) if isinstance(trainer.class_weights, dict) else []
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(
            f"{CLASS_WEIGHTS}: must name classes of the images, but names "
            f"{', '.join(with_nearest(name, known) for name in unknown[:5])}; the classes are {some(classes)}"
        )


def weights_of(trainer: TrainerConfig, train: ImageSet) -> np.ndarray | None:
    """Return a weight per class, float64 [num_classes], or None if they are all equal and so change nothing.

    `balanced` weights are num_images / (num_classes * count of the class), to the power `class_weights_power`, as
    scikit-learn's compute_class_weight; classes without images do not count.

    Raises:
        ConfigError: a class is named that is not there.
    """
    check_weighted(trainer, train.classes)
    weights = np.ones(len(train.classes))
    if isinstance(trainer.class_weights, dict):
        given = dict(zip(composed(list(trainer.class_weights)), trainer.class_weights.values(), strict=True))
        weights = np.array([given.get(name, 1.0) for name in composed(train.classes)])
    elif trainer.class_weights == "balanced":
        counts = np.bincount(train.labels, minlength=len(train.classes))
        there = counts > 0
        weights[there] = (len(train) / (there.sum() * counts[there])) ** trainer.class_weights_power
    return None if (weights == weights[0]).all() else weights


def describe_weights(classes: Sequence[str], weights: np.ndarray) -> str:
    """Name the least and the greatest weight and a class that has it."""
    ends = ((weights[at], printable(classes[at])) for at in (int(weights.argmin()), int(weights.argmax())))
    return "class weights from " + " to ".join(f"{weight:.3g} ({name})" for weight, name in ends)
