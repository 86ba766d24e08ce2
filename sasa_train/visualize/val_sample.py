"""A single pass over a sample of val that keeps in memory only the results that the figures require."""

import itertools
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sasa_train.data.datasets import ImageSet
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import in_batches, read_batches
from sasa_train.data.transforms import as_shown
from sasa_train.device import autocast, resolve
from sasa_train.terminal import progress_bar
from sasa_train.trained import TrainedModel
from sasa_train.visualize.capture import AttentionLayer, attention_layers, checked_weights, watching
from sasa_train.visualize.geometry import Distances, mean_distances, reduction_of, uniform_distance

NUM_MISTAKES = 18
BATCH_SIZE = 16  # K*K weights per head and position take 80 MB in the paper's first stage at 224 pixels


@dataclass
class Prediction:
    """An image, uint8 [H, W, 3], with its label (None if unknown), the model's prediction and its probability.

    `name` is its file's, without folders.
    """

    image: np.ndarray
    label: str | None
    predicted: str
    probability: float
    name: str = ""


@dataclass
class ValSample:
    """The results for `num_images` images.

    `confusion`, int64 [num_classes, num_classes], counts images by label (row) and prediction; `mistakes` are the
    NUM_MISTAKES most confident wrong predictions, in order; `distances` and `relative_scores` ([N, K, K] by layer) are
    empty if they were not requested.
    """

    num_images: int
    confusion: Tensor
    mistakes: list[Prediction]
    distances: list[Distances] = field(default_factory=list)
    relative_scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_right(self) -> int:
        return int(self.confusion.diagonal().sum())


def which_images(found: ValSample, num_all: int) -> str:
    """Describe the sample for captions; `num_all` is the number of images in val."""
    is_all = found.num_images == num_all
    return f"all {num_all:,} val images" if is_all else f"{found.num_images:,} of val's {num_all:,} images"


class AttentionMeans:
    """Accumulates the attention statistics of each layer as sums over images."""

    def __init__(self, size: tuple[int, int]):
        self.size = size  # height and width of the images
        self.distances: dict[str, Tensor] = {}  # in positions, summed over images
        self.scores: dict[str, Tensor] = {}
        self.layers: dict[str, tuple[AttentionLayer, int, int]] = {}  # each with the height and width of its map

    def look(self, name: str, layer: AttentionLayer, x: Tensor) -> None:
        num_images = len(x)
        weights = checked_weights(name, layer, x)
        self.layers[name] = layer, x.shape[2], x.shape[3]
        self.distances[name] = self.distances.get(name, 0) + num_images * mean_distances(layer, weights)
        if (scores := layer.relative_scores(x)) is not None:
            self.scores[name] = self.scores.get(name, 0) + num_images * scores

    def means(self, num_images: int) -> tuple[list[Distances], dict[str, Tensor]]:
        found = []
        for name, (layer, height, width) in self.layers.items():
            reduction = reduction_of((height, width), self.size)
            heads = (reduction * self.distances[name] / num_images).tolist()
            found.append(Distances(name, heads, reduction * uniform_distance(layer, height, width)))
        return found, {name: scores.cpu() / num_images for name, scores in self.scores.items()}


def file_name(images: ImageSet, index: int) -> str:
    """Return the name of an image's file without its folders."""
    return os.path.basename(images.name(index))


@torch.no_grad()
def look_at_val(trained: TrainedModel, images: ImageSet, with_attention: bool = False) -> ValSample:
    """Move the model to the config's device and run it over `images` once.

    Unreadable images are reported and skipped. On a terminal, a progress bar is shown.

    Raises:
        WeightsError: the attention weights of a query do not sum to one.
        ExpectedFailure: the model's output is not finite.
        ConfigError: more images are unreadable than `data.max_unreadable` allows.
    """
    device, config = resolve(trained.config)
    model, classes, normalize = trained.model.to(device), trained.classes, trained.normalize(device)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    mistakes: list[Prediction] = []
    quarantine = Quarantine("val", len(images), config.data.max_unreadable, images)
    means = AttentionMeans(trained.input_size[1:])
    layers = list(attention_layers(model)) if with_attention else []
    bar = progress_bar(total=len(images), desc="val images", unit="img")
    with bar, watching(model, layers, means.look):
        batches = read_batches(in_batches(images, BATCH_SIZE), config.data)
        for start, (pixels, labels, rows, unreadable) in zip(itertools.count(0, BATCH_SIZE), batches, strict=False):
            quarantine.add(unreadable)
            bar.update(len(labels) + len(unreadable))
            if not len(labels):
                continue
            with autocast(device, config.trainer.precision):
                logits = model(normalize(pixels.to(device)))
            if not logits.isfinite().all():
                raise trained.diverged(config.trainer.precision, "no figure would be right")
            top = logits.float().softmax(1).max(1)
            predicted, probabilities = top.indices.cpu(), top.values.tolist()
            confusion.view(-1).index_add_(0, labels * len(classes) + predicted, torch.ones_like(labels))
            mistakes += [
                Prediction(as_shown(pixels[row]).permute(1, 2, 0).numpy(), classes[labels[row]],
                           classes[predicted[row]], probabilities[row], file_name(images, start + rows[row]))
                for row in (predicted != labels).nonzero().flatten().tolist()
            ]  # fmt: skip
            mistakes = sorted(mistakes, key=lambda mistake: -mistake.probability)[:NUM_MISTAKES]
    num_images = int(confusion.sum())
    return ValSample(num_images, confusion, mistakes, *means.means(num_images))
