"""A trained model loaded from a checkpoint, with its classes, image size and normalisation."""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sasa_train.config import own_code
from sasa_train.config.derived import InputSize, as_image_size, at_val_size, input_size, resolved_size, written_size
from sasa_train.config.keys import DataConfig, TrainConfig
from sasa_train.data.datasets import mean_std
from sasa_train.data.decoding import WHITE
from sasa_train.data.fingerprint import differences
from sasa_train.data.reading import image_files, read_fitted
from sasa_train.data.transforms import Normalize, val_shape
from sasa_train.models import build_model, check_model, check_val_size
from sasa_train.refusal import ConfigError, ExpectedFailure, require
from sasa_train.runs.checkpoint import first_misfit, load_checkpoint, other_than_best
from sasa_train.runs.source import check_source, find_checkpoint
from sasa_train.terminal import printable, some, warn

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Ranking = list[tuple[str, float]]  # classes with their softmax probabilities, the most probable first
BATCH_SIZE = 64  # images that `predict` holds in memory


@dataclass
class TrainedModel:
    """A `model` in eval mode on the CPU; `weights` states which of the checkpoint's weights it has, "ema" or "raw".

    `given` has the places of the images, as written, that `config` has as seen from where the model was trained.
    Images are downloaded only if `may_download`, to a data.root that the user gave.
    """

    path: Path
    checkpoint: dict[str, Any]
    config: TrainConfig
    model: nn.Module
    weights: str
    given: dict[str, str] = field(default_factory=dict)
    may_download: bool = False

    def check_places(self) -> None:
        """Say on stderr where the images of val are, if the checkpoint's config has the place in another way.

        Raises:
            ConfigError: they would have to be downloaded to a folder that only the checkpoint names.
        """
        from sasa_train.config.places import tell_places
        from sasa_train.data.datasets import check_whole_set

        tell_places(self.given, self.config)
        if not self.may_download:
            check_whole_set(self.config.data, self.classes)

    @property
    def directory(self) -> Any:
        """The directory in which the model was trained; None if it is not recorded."""
        return self.checkpoint["provenance"].get("directory")

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return self.checkpoint["classes"]

    @property
    def image_size(self) -> int | list[int]:
        """The side length of the images that `transform` returns or, if they are not square, [height, width]."""
        return as_image_size(*self.input_size[1:])

    @property
    def input_size(self) -> InputSize:
        """The channels, height and width of the images that `transform` returns (`data.val_image_size`)."""
        return input_size(at_val_size(self.config.data))

    def normalize(self, device: torch.device) -> Normalize:
        """Return the normalisation that the model was trained with, for images [B, C, H, W] from `val_shape`."""
        data = self.config.data
        return Normalize(*mean_std(data), device, self.config.trainer.channels_last, WHITE[data.mode])

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The preprocessing of one image, as for val: a function from a PIL image to float32 [C, H, W]."""
        shape, normalize = val_shape(self.config.data), self.normalize(torch.device("cpu"))
        return lambda image: normalize(torch.tensor(shape(image)).permute(2, 0, 1)[None])[0]

    @torch.inference_mode()
    def predict(self, paths: Paths, top: int = 5) -> list[Any]:
        """Return the `top` most probable classes of image files, most probable first, as (class, probability).

        For one path, the result is a list of such pairs; for several, a list with one such list per path.

        Raises:
            FileNotFoundError, IsADirectoryError: a path is missing, or a folder.
            ConfigError: `top` is below 1, a file cannot be read as an image (the message names it), or the model's
                output is not finite.
        """
        require(top >= 1, "top", top, "must be at least 1")
        if isinstance(paths, str | os.PathLike):
            return self.predict([paths], top)[0]
        device, found = next(self.model.parameters()).device, []
        names = [os.fspath(path) for path in paths]
        _check_paths(names)
        for start in range(0, len(names), BATCH_SIZE):
            batch = names[start : start + BATCH_SIZE]
            images = image_files(batch)
            read = read_fitted(images, range(len(images)), self.config.data)
            for name, reason in read.unreadable:
                raise ConfigError(f"{printable(name)}: cannot be read as an image ({printable(reason)})")
            logits = self.model(self.normalize(device)(read.pixels.to(device)))
            if not logits.isfinite().all():
                raise ConfigError(f"{printable(self.path)}: the model's output is not finite for one of {some(batch)}")
            found += most_probable(logits, self.classes, top)
        return found

    def diverged(self, precision: str, found: str) -> ExpectedFailure:
        """Return the error for a model whose output is not finite in `precision`, with what was found."""
        # Weights that are finite may still overflow. topk ranks NaN first, so that all figures would be wrong.
        other = "" if precision == "fp32" else ", or try trainer.precision=fp32"
        return ExpectedFailure(
            f"{printable(self.path)}: {found}, because the model's output is not finite, or too large, in {precision}; "
            f"it has diverged: take an earlier checkpoint{other}"
        )

    def changes(self, val: dict[str, Any]) -> list[str]:
        """List the differences between the fingerprint `val` and that of the val images used in training."""
        before = self.checkpoint["fingerprint"]
        return differences(before["val"], val, "val") if before else []


def _check_paths(names: Sequence[str]) -> None:
    """Raise FileNotFoundError or IsADirectoryError for the first path that is missing or a folder."""
    for name in names:
        if os.path.isdir(name):
            files = f"give its files, as in sorted(Path({name!r}).glob('*.jpg')), or use sasa-predict"
            raise IsADirectoryError(errno.EISDIR, f"is a folder; {files}", name)
        if not os.path.exists(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def most_probable(logits: Tensor, classes: Sequence[str], top: int) -> list[Ranking]:
    """Return, for each row of `logits` [B, num_classes], the `top` classes (or all, if there are fewer), best first."""
    logits = logits.float()
    labels = logits.topk(min(top, len(classes)), dim=1).indices  # logits, because probabilities may tie at 1
    shares = logits.softmax(1).gather(1, labels)
    return [
        [(classes[label], share) for label, share in zip(*pair, strict=True)]
        for pair in zip(labels.tolist(), shares.tolist(), strict=True)
    ]


def load_trained(source: str | Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """Load a checkpoint file or a run folder's best.pt (last.pt if there is no best.pt).

    overrides: overrides of the checkpoint's config; `weights=raw` selects the model's own weights instead of their
        moving average, which is the default if the run kept one.

    Raises:
        CheckpointError: `source` contains no readable checkpoint.
        ConfigError: an override is invalid or changes the model, or this is one of several processes, which would all
            do the same work.
    """
    # Imported here, because importing Hydra takes a tenth of a second.
    from sasa_train.config.overrides import split_weights
    from sasa_train.config.own_keys import targets_of, use_code
    from sasa_train.config.places import as_given, where_trained
    from sasa_train.config.saved import load_config

    check_source(Path(source), overrides)
    use_code(overrides)
    path = find_checkpoint(Path(source))
    checkpoint = load_checkpoint(path)
    if other := other_than_best(path):
        warn(other)
    wanted, others = split_weights(overrides)
    saved = load_config(checkpoint["config"], source=str(path))
    own_code.check_named(saved.imports, targets_of(saved, ("model.target",)), str(path), later=targets_of(saved))
    check_weights(checkpoint, saved, path)
    _check_size(saved.data, others)
    if any(text.startswith("data.name=") for text in others):
        others = _own_preprocessing(saved.data) + others
    written = load_config(checkpoint["config"], others, source=str(path)) if others else saved
    config = where_trained(written, checkpoint["provenance"].get("directory"), others)
    weights = wanted or ("ema" if checkpoint["ema"] is not None else "raw")
    if weights == "ema" and checkpoint["ema"] is None:
        raise ConfigError(f"weights=ema: {path} has no moving average; it was trained with trainer.ema_decay=null")
    state_dict = checkpoint["ema"] if weights == "ema" else checkpoint["model"]
    model = _build(config, state_dict, len(checkpoint["classes"]))
    may_download = any(text.startswith("data.root=") for text in others)
    return TrainedModel(path, checkpoint, config, model, weights, as_given(written, config), may_download)


def check_weights(checkpoint: dict[str, Any], saved: TrainConfig, path: Path) -> None:
    """Raise ConfigError if a checkpoint's weights are not those of a finite model of its own config, `saved`.

    The model is built without memory for weights, so that a config cannot demand more than the checkpoint has.
    """
    from sasa_train.runs.folder import check_average  # imports Hydra, which takes a tenth of a second

    check_average(checkpoint, saved, path)
    model = check_model(saved.model, input_size(saved.data), len(checkpoint["classes"]))
    for key in ("model", "ema"):
        if checkpoint[key] is not None and (wrong := first_misfit(model, checkpoint[key])):
            raise ConfigError(
                f"{path}: the checkpoint's weights are not those of a model of its config: {key}.{wrong}; bring back "
                "the one that the run wrote"
            )


def _check_size(data: DataConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a data.image_size that changes nothing, because data.val_image_size is the images' size."""
    given = dict(text.partition("=")[::2] for text in overrides)
    if data.val_image_size is not None and "data.image_size" in given and "data.val_image_size" not in given:
        size = written_size(*resolved_size(at_val_size(data)))
        rule = f"is the size of training, and this run's val has data.val_image_size={size}; give data.val_image_size"
        require(False, "data.image_size", given["data.image_size"], rule)


def _own_preprocessing(data: DataConfig) -> list[str]:
    """Return overrides that keep the image size and normalisation used in training when the data set is changed."""
    mean, std = mean_std(data)
    return [f"data.image_size={written_size(*resolved_size(data))}", f"data.mean={list(mean)}", f"data.std={list(std)}"]


def _build(config: TrainConfig, state_dict: dict[str, Any], num_classes: int) -> nn.Module:
    size = input_size(config.data)
    if wrong := first_misfit(check_model(config.model, size, num_classes), state_dict):
        raise ConfigError(f"the overrides make another model than the checkpoint's: {wrong}")
    check_val_size(config.model, size, input_size(at_val_size(config.data)))
    model = build_model(config.model, num_classes, size)
    model.load_state_dict(state_dict)
    return model.eval()
