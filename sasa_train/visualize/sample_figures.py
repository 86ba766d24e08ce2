"""A figure of the training inputs, with train images next to their augmented versions."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sasa_train.config.derived import flips_images
from sasa_train.config.keys import TrainConfig
from sasa_train.data.datasets import ImageSet, balanced, mean_std
from sasa_train.data.mixing import Mixing
from sasa_train.data.plan import MicroBatch
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import Reader, read_fitted
from sasa_train.data.transforms import Augment, as_shown
from sasa_train.figures import WIDTH, fitted, new_figure, set_title
from sasa_train.trained import TrainedModel


def augmented_samples(
    trained: TrainedModel, train: ImageSet, num_images: int, num_epochs: int
) -> tuple[Tensor, list[Tensor], list[str]]:
    """Return train images, uint8 [B, 3, H, W], as for val, as augmented in each of the first epochs, and their labels.

    With mixup or cutmix, these images are mixed with one another, whereas training mixes them with other images.

    Raises:
        ConfigError: more images are unreadable than `data.max_unreadable` allows.
    """
    config, indices = trained.config, balanced(train, num_images)
    quarantine = Quarantine("train", len(train), config.data.max_unreadable)
    plain, labels, _, unreadable = read_fitted(train, indices, config.data, quarantine.num_tries)
    quarantine.add(unreadable)
    mean, _ = mean_std(config.data)
    augment = Augment(config.data, config.augment, config.seed, mean)
    read = Reader(train, config.data, quarantine.num_tries, augment)
    mixing = Mixing(config.augment, len(trained.classes), config.seed, last_step=num_epochs)
    normalize = trained.normalize(torch.device("cpu"))
    augmented = []
    for epoch in range(num_epochs):
        pixels = read(MicroBatch(indices, epoch, epoch, 0, indices)).pixels
        mixed, _ = mixing(normalize(pixels), labels, epoch, 0)
        augmented.append(normalize.undo(mixed))
    return as_shown(plain), augmented, [trained.classes[label] for label in labels.tolist()]


def draw_augmented(plain: Tensor, augmented: list[Tensor], labels: list[str], config: TrainConfig) -> Figure:
    """Draw one row per image: the original above its label, then one augmented version per epoch."""
    num_columns = 1 + len(augmented)
    figure, axes = new_figure(len(plain), num_columns, 0.7 + len(plain) * (0.25 + WIDTH / (num_columns + 0.3)))
    columns = [plain, *augmented]
    for place, axis in enumerate(axes):
        row, column = divmod(place, num_columns)
        axis.imshow(columns[column][row].permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if column == 0:
            axis.set_xlabel(fitted(labels[row], WIDTH / num_columns - 0.1, 7, 2), fontsize=7)
        if row == 0:
            axis.set_title("as val sees it" if column == 0 else f"epoch {column}", fontsize=8)
    set_title(figure, f"augmented train images: {describe_augmentation(config)}")
    return figure


def describe_augmentation(config: TrainConfig) -> str:
    augment = config.augment
    parts = ["crop"] if augment.crop else []
    parts += ["flip"] if flips_images(config.data, augment) else []
    parts += [augment.policy] if augment.policy != "none" else []
    parts += [name for name in ("brightness", "contrast", "saturation", "hue") if getattr(augment, name)]
    parts += ["erasing"] if augment.erasing_prob else []
    parts += [name for name in ("mixup", "cutmix") if getattr(augment, name)]
    return ", ".join(parts) or "none"
