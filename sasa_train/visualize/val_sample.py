"""One pass over a sample of val: what the figures need of it, and no more than that in memory."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sasa_train.data.datasets import ImageSet
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import read_or_replace
from sasa_train.data.transforms import fit
from sasa_train.device import autocast
from sasa_train.trained import TrainedModel
from sasa_train.visualize.capture import AttentionLayer, attention_layers, checked_weights, watching
from sasa_train.visualize.distance import Distances, mean_distances, uniform_distance
from sasa_train.visualize.window import reduction_of

NUM_MISTAKES = 18
BATCH_SIZE = 16  # a layer has K*K weights a head and position: 80 MB of the paper's first stage at 224 pixels


@dataclass
class Prediction:
    """One image, uint8 [S, S, 3], the label (None: not known) and what the model says with which probability."""

    image: np.ndarray
    label: str | None
    predicted: str
    probability: float


@dataclass
class ValSample:
    """What was seen of `num_images` images.

    `confusion` int64 [num_classes, num_classes] counts images by label (row) and prediction; `mistakes` are the
    NUM_MISTAKES most confident ones, first the surest; `distances` and `relative_scores` ([N, K, K] by layer) are empty
    where they were not asked for.
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
    """For captions; `num_all` is how many images val has."""
    is_all = found.num_images == num_all
    return f"all {num_all:,} val images" if is_all else f"{found.num_images:,} of val's {num_all:,} images"


class AttentionMeans:
    """Sums over images of what each layer's attention does."""

    def __init__(self, image_size: int):
        self.image_size = image_size
        self.distances: dict[str, Tensor] = {}  # in positions, summed over images
        self.scores: dict[str, Tensor] = {}
        self.layers: dict[str, tuple[AttentionLayer, int, int]] = {}  # with height and width of its map

    def look(self, name: str, layer: AttentionLayer, x: Tensor) -> None:
        num_images = len(x)
        weights = checked_weights(name, layer, x)
        self.layers[name] = layer, x.shape[2], x.shape[3]
        self.distances[name] = self.distances.get(name, 0) + num_images * mean_distances(weights)
        if (scores := layer.relative_scores(x)) is not None:
            self.scores[name] = self.scores.get(name, 0) + num_images * scores

    def means(self, num_images: int) -> tuple[list[Distances], dict[str, Tensor]]:
        found = []
        for name, (layer, height, width) in self.layers.items():
            reduction = reduction_of(height, self.image_size)
            heads = (reduction * self.distances[name] / num_images).tolist()
            found.append(Distances(name, heads, reduction * uniform_distance(layer, height, width)))
        return found, {name: scores.cpu() / num_images for name, scores in self.scores.items()}


@torch.no_grad()
def look_at_val(trained: TrainedModel, images: ImageSet, device: torch.device, with_attention: bool) -> ValSample:
    """Run the model over `images` once, on a device that it is moved to.

    Raises:
        WeightsError: attention weights that do not sum to one.
        ConfigError: more images cannot be read than `data.max_unreadable` allows.
    """
    model, classes, normalize = trained.model.to(device), trained.classes, trained.normalize(device)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    worst: list[tuple[float, int, Prediction]] = []  # a heap with the least sure first; the count breaks ties
    means, count = AttentionMeans(trained.image_size), itertools.count()
    layers = list(attention_layers(model)) if with_attention else []
    with watching(model, layers, means.look):
        for pixels, labels in read_batches(images, trained):
            with autocast(device, trained.config.trainer.precision):
                logits = model(normalize(pixels.to(device)))
            top = logits.float().softmax(1).max(1)
            predicted, probabilities = top.indices.cpu(), top.values.tolist()
            confusion.view(-1).index_add_(0, labels * len(classes) + predicted, torch.ones_like(labels))
            for row in (predicted != labels).nonzero().flatten().tolist():
                image, label = pixels[row].permute(1, 2, 0).numpy(), classes[labels[row]]
                mistake = Prediction(image, label, classes[predicted[row]], probabilities[row])
                heapq.heappush(worst, (mistake.probability, -next(count), mistake))
                if len(worst) > NUM_MISTAKES:
                    heapq.heappop(worst)
    num_images = int(confusion.sum())
    mistakes = [mistake for *_, mistake in sorted(worst, reverse=True)]
    return ValSample(num_images, confusion, mistakes, *means.means(num_images))


def read_batches(images: ImageSet, trained: TrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 [B, 3, S, S] as val sees them, and labels; with a progress bar where there is a terminal.

    What cannot be read is named and left out.
    """
    quarantine = Quarantine("val", len(images), trained.config.data.max_unreadable)
    with tqdm(total=len(images), desc="val images", unit="img", disable=None, leave=False) as bar:
        for start in range(0, len(images), BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, len(images)))
            pixels, labels = read_images(images, indices, trained.image_size, quarantine)
            if len(labels):
                yield pixels, labels
            bar.update(len(indices))


def read_images(
    images: ImageSet, indices: Sequence[int], size: int, quarantine: Quarantine, num_tries: int = 1
) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, size, size] as val sees them, and labels [B]. What cannot be read is named, and left out (or, with
    more tries, replaced by the next image).
    """
    found = [read_or_replace(images, index, partial(fit, size=size), num_tries) for index in indices]
    quarantine.add([unreadable for *_, met in found for unreadable in met])
    good = [(image, label) for image, label, _ in found if image is not None]
    pixels = np.stack([image for image, _ in good]) if good else np.empty((0, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([label for _, label in good], dtype=torch.int64)
