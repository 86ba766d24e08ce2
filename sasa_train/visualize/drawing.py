"""All figures of one run, drawn one at a time for the command and for the report page."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import ImageSet, has_train, limit, load_image_sets, load_val_set, relabelled
from sasa_train.data.fingerprint import fingerprint
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import image_files, read_fitted
from sasa_train.data.transforms import as_shown
from sasa_train.device import autocast, resolve
from sasa_train.refusal import ConfigError
from sasa_train.runs.metrics import read_metrics
from sasa_train.terminal import printable
from sasa_train.trained import TrainedModel
from sasa_train.visualize.attention_figures import (
    View,
    draw_attention_heads,
    draw_attention_maps,
    draw_distances,
    draw_relative_embeddings,
)
from sasa_train.visualize.capture import AttentionLayer, attention_layers, attention_of
from sasa_train.visualize.class_figures import draw_class_accuracy, draw_confusion, draw_mistakes
from sasa_train.visualize.curve_figures import Drawn, Rows, draw_curves, too_short
from sasa_train.visualize.geometry import default_pixels, window_at
from sasa_train.visualize.names import NAMES, OF_ATTENTION, OF_CLASSES, OF_SEVERAL
from sasa_train.visualize.sample_figures import augmented_samples, draw_augmented
from sasa_train.visualize.val_sample import Prediction, ValSample, file_name, look_at_val, which_images

log = logging.getLogger("sasa_train")

NUM_IMAGES = 512  # val images used for figures that show counts or means
NUM_MAP_IMAGES, NUM_AUGMENTED, NUM_EPOCHS = 3, 4, 7
COLORS = "from no colour over purple to yellow, the weight grows"
NO_EXPLANATION = "These weights show what a layer takes from where; they do not explain the predicted class."
MAPS, MEANS = OF_ATTENTION[:2], OF_ATTENTION[2:]


@dataclass
class Choice:
    """Selects what attention maps show: by default, a few val images, the last layer of each stage, and all heads.

    `pixels` are (row, column) in the image as the model receives it.
    """

    files: Sequence[str] = ()
    layers: Sequence[str] | None = None
    heads: Sequence[int] | None = None
    pixels: Sequence[tuple[int, int]] | None = None


def draw_run(
    trained: TrainedModel,
    run_dir: Path | None,
    names: Sequence[str] = NAMES,
    num_images: int = NUM_IMAGES,
    choice: Choice | None = None,
) -> Iterator[Drawn]:
    """Draw the named figures that this run can have (`not_drawable` explains why others cannot be drawn).

    Figures that need no data come first, so that the caller receives them even if the data is missing.

    Args:
        run_dir: the folder that contains metrics.jsonl; None uses the copy in the checkpoint.
        num_images: maximum number of val images (a fixed, class-balanced subset).

    Raises:
        WeightsError: the attention weights of a query do not sum to one.
        ConfigError: the data or the choice is invalid.
    """
    choice = choice or Choice()
    wanted = [name for name in names if name not in not_drawable(trained, run_dir)]
    check_choice(trained, choice)
    yield from draw_curves({"": read_rows(trained, run_dir)}, wanted)
    maps = [name for name in wanted if name in MAPS]
    if choice.files:
        yield from _draw_maps(trained, maps, *read_files(choice.files, trained.config.data), choice)
        maps = []
    if not maps and not set(wanted) - {*OF_SEVERAL, *MAPS}:
        return
    data = trained.config.data
    trained.check_places()
    val = load_val_set(data, trained.classes)
    for line in trained.changes(fingerprint(val)) if set(wanted) & set(OF_CLASSES) else ():
        log.warning(f"WARNING: not the images that the run was evaluated on: {line}")
    if "augmented_samples" in wanted:
        train = relabelled(load_image_sets(data)[0], trained.classes, data.place, "the checkpoint", "train")
        shown = augmented_samples(trained, train, NUM_AUGMENTED, NUM_EPOCHS)
        caption = (
            f"{len(shown[0])} train images and what the run's own augmentation makes of them in its first {NUM_EPOCHS} "
            "epochs."
        )
        yield "augmented_samples", draw_augmented(*shown, trained.config), caption
    if maps:
        yield from _draw_maps(trained, maps, *read_first(trained, val), choice)
    of_val = [name for name in wanted if name in (*MEANS, *OF_CLASSES)]
    if of_val:
        found = look_at_val(trained, limit(val, num_images), with_attention=bool(set(MEANS) & set(of_val)))
        yield from _draw_means(trained, of_val, found, which_images(found, len(val)))
        yield from draw_classes(found, trained.classes, len(val), of_val)


def not_drawable(trained: TrainedModel, run_dir: Path | None) -> dict[str, str]:
    """Return a dict that maps each figure that cannot be drawn to the reason."""
    reasons: dict[str, str] = {}
    layers = attention_layers(trained.model)
    if not layers:
        why = f"{trained.config.model.title} has no local self-attention of ours"
        reasons |= dict.fromkeys(OF_ATTENTION, why)
    elif all(layer.rel_height is None for layer in layers.values()):
        reasons["relative_embeddings"] = "its layers have no relative embeddings"
    if not has_train(trained.config.data):
        place, is_list = trained.config.data.place, trained.config.data.name == "list"
        reasons["augmented_samples"] = f"{place} is not a list of train" if is_list else f"{place} has no train/"
    rows = read_rows(trained, run_dir)
    return reasons | (too_short({"": rows}) if rows else dict.fromkeys(OF_SEVERAL, "it has no metrics"))


def read_rows(trained: TrainedModel, run_dir: Path | None) -> Rows:
    """Read metrics.jsonl or, if it is missing, the copy in the checkpoint, which ends at the checkpoint's step."""
    rows = [] if run_dir is None else read_metrics(run_dir / "metrics.jsonl")
    return rows or [json.loads(line) for line in trained.checkpoint["metrics"].splitlines()]


def check_choice(trained: TrainedModel, choice: Choice) -> None:
    layers, (height, width) = attention_layers(trained.model), trained.input_size[1:]
    for name in choice.layers or ():
        if name not in layers:
            raise ConfigError(f"--layers {printable(name)} must be one of {', '.join(layers)}")
    most = max((layers[name].num_heads for name in choice.layers or default_layers(trained)), default=0)
    for head in choice.heads or ():
        if head >= most:
            raise ConfigError(f"--heads {head} must be below {most}: the layers shown have no more heads")
    for row, column in choice.pixels or ():
        if not (0 <= row < height and 0 <= column < width):
            raise ConfigError(
                f"--pixels {row},{column} must lie in the image as the model sees it, 0,0 to {height - 1},{width - 1}"
            )


def read_files(files: Sequence[str], data: DataConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Read the user's own images as [B, C, H, W], with all labels set to -1, and their names.

    Raises:
        ConfigError: an image cannot be read.
    """
    found = read_fitted(image_files(files), range(len(files)), data)
    for name, reason in found.unreadable:
        raise ConfigError(f"--images {printable(name)}: cannot be read as an image ({reason})")
    return found.pixels, found.labels, [os.path.basename(file) for file in files]


def read_first(trained: TrainedModel, val: ImageSet) -> tuple[Tensor, Tensor, list[str]]:
    """Read a few val images of different classes, along with their labels and names.

    Raises:
        ConfigError: none of the images can be read.
    """
    first = limit(val, NUM_MAP_IMAGES)
    found = read_fitted(first, range(len(first)), trained.config.data)
    Quarantine("val", len(first), trained.config.data.max_unreadable).add(found.unreadable)
    if not len(found.labels):
        raise ConfigError(f"none of {len(first)} val images can be read; give others with --images")
    return found.pixels, found.labels, [file_name(first, row) for row in found.rows]


def default_layers(trained: TrainedModel) -> list[str]:
    """Return the name of the last attention layer in the stem and in each stage."""
    return list({name.partition(".")[0]: name for name in attention_layers(trained.model)}.values())


def _draw_maps(
    trained: TrainedModel, names: Sequence[str], images: Tensor, labels: Tensor, files: list[str], choice: Choice
) -> Iterator[Drawn]:
    if not names:
        return
    views = look_at_images(trained, images, labels, files, choice)
    if "attention_maps" in names:
        caption = (
            f"Where {len(views)} query pixels (dots) of {len(images)} images look: the weights of the window around "
            f"each in some layers, mean over heads; {COLORS}. {NO_EXPLANATION}"
        )
        yield "attention_maps", draw_attention_maps(views), caption
    if "attention_heads" in names:
        caption = f"The weights of one query pixel by layer and head; {COLORS}. {NO_EXPLANATION}"
        yield "attention_heads", draw_attention_heads(views[0], choice.heads), caption


def look_at_images(
    trained: TrainedModel, images: Tensor, labels: Tensor, files: list[str], choice: Choice
) -> list[View]:
    """Return a view for each query pixel of each image; images: [B, C, H, W], labels: [B], -1 if unknown."""
    layers = list(choice.layers or default_layers(trained))
    device, config = resolve(trained.config)
    model, normalize = trained.model.to(device), trained.normalize(device)
    named = attention_layers(model)
    views = []
    for image, label, file in zip(images, labels.tolist(), files, strict=True):
        pixels = as_shown(image).permute(1, 2, 0).numpy()
        queries = list(choice.pixels or default_pixels(pixels))
        with autocast(device, config.trainer.precision):
            logits, weights = attention_of(model, normalize(image[None].to(device)), layers)
        top = logits[0].float().softmax(0).max(0)
        name = None if label < 0 else trained.classes[label]
        prediction = Prediction(pixels, name, trained.classes[int(top.indices)], float(top.values), file)
        of_image = {layer: found[0].cpu() for layer, found in weights.items()}
        for query in queries:
            size = trained.input_size[1:]
            windows = {name: window_at(named[name], found, query, size) for name, found in of_image.items()}
            views.append(View(prediction, query, windows))
    return views


def _draw_means(trained: TrainedModel, names: Sequence[str], found: ValSample, images: str) -> Iterator[Drawn]:
    if "attention_distance" in names:
        caption = (
            f"Mean distance between query and key, weighted by attention, by layer and head, over {images}. Right: "
            "below 1, a head attends to nearer pixels than uniform weights would."
        )
        yield "attention_distance", draw_distances(found.distances, found.num_images), caption
    if "relative_embeddings" in names:
        caption = (
            f"The learned relative embeddings by key offset: their norms, and the mean score q·r over {images}. Purple "
            "offsets are favoured and orange ones avoided, whatever the image shows."
        )
        layers = attention_layers(trained.model)
        norms = {name: embedding_norms(layers[name]) for name in found.relative_scores}
        figure = draw_relative_embeddings(norms, found.relative_scores, found.num_images)
        yield "relative_embeddings", figure, caption


def draw_classes(
    found: ValSample, classes: list[str], num_all: int, names: Sequence[str] = OF_CLASSES
) -> Iterator[Drawn]:
    """Draw correct and wrong predictions class by class; `num_all` is the number of images in val."""
    images, num_wrong = which_images(found, num_all), found.num_images - found.num_right
    top1 = f"top1 {100 * found.num_right / found.num_images:.2f} % over {images}"
    if "class_accuracy" in names:
        caption = f"top1 by class; {top1}. A class with few images moves a lot with each of them."
        yield "class_accuracy", draw_class_accuracy(found.confusion, classes), caption
    if "confusion_matrix" in names:
        caption = (
            f"Labels (rows) by predictions (columns); {top1}. Right predictions are on the diagonal. The colours "
            "follow a square root, so that rare mistakes stay visible."
        )
        yield "confusion_matrix", draw_confusion(found.confusion, classes), caption
    if "mistakes" in names:
        which = f"The {len(found.mistakes)} most confident of {num_wrong:,} mistakes" if num_wrong else "No mistakes"
        caption = f"{which}, over {images}." + (" Check whether the labels are right." if num_wrong else "")
        yield "mistakes", draw_mistakes(found.mistakes, found.num_images, num_wrong), caption


def embedding_norms(layer: AttentionLayer) -> Tensor:
    """Return the norm of r at each offset, [K, K], averaged over heads if each has its own embeddings."""
    assert layer.rel_height is not None and layer.rel_width is not None
    rows, columns = (rel.detach().cpu().double().square().sum(-1) for rel in (layer.rel_height, layer.rel_width))
    norms = (rows[..., :, None] + columns[..., None, :]).sqrt()
    return norms if norms.dim() == 2 else norms.mean(0)
