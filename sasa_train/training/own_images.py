"""Choose the keys in `derive` from the images when a run begins, and keep them when it goes on.

The rules are in `RULES`. They are a pure function of the config and of `Facts` about the images, so that a run that was
killed before it saved anything makes the same choices again. docs/data.md describes them.
"""

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sasa_train.config.derived import in_pixels, input_size, resolved_image_size, resolved_size
from sasa_train.config.keys import MODEL_KEYS, OWN_MODELS, PUBLISHED, SMALL_IMAGE, TrainConfig, flatten, with_values
from sasa_train.config.overrides import as_written
from sasa_train.config.rules import check_world_size, validate
from sasa_train.config.saved import as_begun, to_yaml
from sasa_train.data.class_weights import check_weighted
from sasa_train.data.datasets import (
    VAL_SPLITS,
    Files,
    ImageSet,
    UnreadableImage,
    beside_splits,
    check_level,
    check_several,
    holds_class_folders,
    kind_of,
    load_image_sets,
    load_train,
    reads_torchvision,
    remote_val,
    split,
)
from sasa_train.data.hf_sets import build_hf
from sasa_train.data.loader import check_batch
from sasa_train.data.named_sets import build_named
from sasa_train.device import uses_cuda
from sasa_train.files import did_you_mean
from sasa_train.models.build import check_model, check_name
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import ConfigError
from sasa_train.runs.folder import begun_config
from sasa_train.runs.weights import Weights, read_weights
from sasa_train.terminal import columns, printable, say, some, warn

MIN_STEPS = 20  # per epoch
MAX_BATCH = 256
NUM_SIZES = 64  # images whose sizes are looked at
MAX_SIZE_CPU, MAX_SIZE_CUDA = 64, 224  # pixels
MAX_ENLARGED = 2  # times; above this, a warning follows
NEAR = 2  # times: a value that was set within this of the one that would be chosen is as good
STEPS, STEPS_FINE = 1200, 400  # of the whole run, for few images
Choice = tuple[Any, str]  # a value and its reason


@dataclass(frozen=True)
class Facts:
    """What the choices depend on besides the config."""

    num_images: int  # in train, after the hold-out
    num_classes: int
    side: int  # median of the shorter sides of the images, in pixels
    has_cuda: bool = False
    source: Weights | None = None  # of model.pretrained


def settle_open_keys(config: TrainConfig, run_name: str) -> TrainConfig:
    """Give the keys in `derive` the values that the run began with or, for a new run, values chosen from the images.

    Raises:
        ConfigError: the images are refused (see `look`), or a choice is incompatible with a key that is set.
        CheckpointError: the checkpoint given by `resume` is damaged.
    """
    if not config.derive:
        return config
    begun = begun_config(config, run_name)
    config = as_begun(config, to_yaml(begun)) if begun is not None else choose(config)[0]
    validate(config)
    check_world_size(config, world_size())
    return config


def choose(config: TrainConfig) -> tuple[TrainConfig, Facts]:
    """Look at the images, choose the keys in `derive`, and print each choice with its reason.

    Raises:
        ConfigError: the images are refused (see `look`), or are fewer than the batch size that is set, or the choices
            do not go together with what is set.
    """
    if config.model.target is None:
        check_name(config.model.name)
    config, facts = look(config)
    if "trainer.global_batch_size" not in config.derive:
        check_batch(config, facts.num_images)
    chosen = dict[str, Choice]()
    for key, rule in RULES.items():
        if key in config.derive:
            chosen[key] = rule(config, facts)
            config = with_values(config, {key: chosen[key][0]})
    validate(config)
    if config.model.target is None:
        check_model(config.model, input_size(config.data))  # before the choices, which would hide the error
    for key, (value, reason) in chosen.items():
        if value is not None:
            _tell(f"chosen      {key}={as_written(value)}: {reason}")
    for text in (_as_set(config, facts), *_would_be_chosen(config, facts)):
        if text:
            _tell(text)
    _warn_if_enlarged(config, facts)
    return config, facts


def _as_set(config: TrainConfig, facts: Facts) -> str:
    """Say that a model of ours that was chosen as a group keeps its full width, or return ""."""
    model, narrow = config.model, _small_net(config, facts).get("width")
    is_group = not any(key.startswith("model.") for key in config.derive)
    if not is_group or model.width is not None or model.source or facts.source is not None or narrow is None:
        return ""
    return (
        f"as set      model={model.name} is the net at full width, with about {1 / narrow[0] ** 2:.0f} times the "
        f"parameters of the one for these images: for model.width={narrow[0]}, write model.name={model.name} instead"
    )


def _would_be_chosen(config: TrainConfig, facts: Facts) -> Iterator[str]:
    """Name the keys of the recipe that were set to something far from what would be chosen, and that."""
    # The rules are for AdamW, and a preset that leaves only the hold-out open has a recipe of its own.
    if not {*RULES} & {*config.derive} or (config.optimizer.name, config.optimizer.lr_basis) != ("adamw", "absolute"):
        return
    values = flatten(config)
    for key in ("trainer.global_batch_size", "trainer.epochs", "schedule.warmup_epochs", "optimizer.lr"):
        best, reason = RULES[key](config, facts)
        given = values[key]
        if key not in config.derive and not max(given, best) <= NEAR * min(given, best):
            chosen = f"{as_written(best)} would be chosen for these images: {reason}"
            yield f"as set      {key}={as_written(given)}; {chosen}"


def _warn_if_enlarged(config: TrainConfig, facts: Facts) -> None:
    """Warn of an image size that was set and is far above the images' own; weights may need one."""
    given, size = config.data.image_size, min(resolved_size(config.data))
    if given and "data.image_size" not in config.derive and facts.source is None and size > MAX_ENLARGED * facts.side:
        warn(
            f"the images are {facts.side} pixels (median of their shorter sides); data.image_size={as_written(given)} "
            "enlarges them "
            f"{size / facts.side:.3g} times, which takes more time and memory and shows no more of them; without this "
            "key, a size is chosen"
        )


def _tell(text: str) -> None:
    width = min(80, columns(sys.stdout) or 80)
    say(textwrap.fill(text, width, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False))


def look(config: TrainConfig) -> tuple[TrainConfig, Facts]:
    """Find the images and choose the hold-out; return the config with it, and the facts.

    Raises:
        ConfigError: there is no such folder, it has train/ beside other folders of images, it looks like the folder
            above the right one, a class has no image, or there is only one class.
    """
    if config.model.pretrained == PUBLISHED and "model.name" in config.derive:
        raise ConfigError(
            "model.pretrained=timm: of which model? Add its name, as in model=timm model.name=resnet18.a1_in1k"
        )
    train, held_out = _find(config)
    check_weighted(config.trainer, train.classes)
    if "data.holdout_fraction" in config.derive:
        config = with_values(config, {"data.holdout_fraction": held_out})
    num_found = len(train)
    if config.data.holdout_fraction > 0:
        train, val = split(train, config.data.holdout_fraction)
    if "data.holdout_fraction" in config.derive and held_out > 0:
        part = f"{len(val):,} of {num_found:,} images, a fixed part of each class"
        lacking = {"list": "no data.val", "torchvision": "no val or test", "hf": "no validation or test"}
        missing = lacking.get(config.data.name, "no val/ or test/")
        _tell(f"chosen      data.holdout_fraction={held_out}: {missing}, so {part}, are held out as val")
    count = min(len(train), config.data.max_train_images or len(train))
    source = read_weights(config) if config.model.pretrained is not None else None
    return config, Facts(count, len(train.classes), _median_side(train), uses_cuda(config.trainer), source)


def _find(config: TrainConfig) -> tuple[ImageSet, float]:
    """Return all images of train, and the part to hold out of them."""
    data, root = config.data, Path(config.data.folder)
    if data.name == "own":
        return load_train(data), 0.0
    if data.name in ("torchvision", "hf"):
        has_val = build_named(data)[1] is not None if data.name == "torchvision" else "val" in build_hf(data)
        return _with_holdout(load_train(data), has_val)
    if data.name == "list":
        return _with_holdout(load_train(data), data.val is not None)
    if data.name == "digits" or reads_torchvision(data):
        return load_image_sets(data)[0], 0.0
    if data.is_remote:
        return _with_holdout(load_train(data), remote_val(data.folder, data.split) is not None)
    if not root.is_dir():
        raise ConfigError(
            f"data.root={root}: there is no such folder{did_you_mean(root)}; give one that has a folder of images "
            "per class"
        )
    has_val = any(kind_of(root, name) for name in VAL_SPLITS[data.split]) and not holds_class_folders(root)
    if (root / "train").is_dir() and not has_val and (others := beside_splits(root)):
        raise ConfigError(
            f"data.root={printable(root)}: holds train/ and, beside it, other folders of images ({some(others)}): move "
            "them into train/ if they are classes, name one val/ if it is for validation, or move them away"
        )
    has_val = has_val or data.split is not None
    train = load_train(with_values(config, {"data.holdout_fraction": 0.0 if has_val else 0.2}).data)
    check_several(train)
    train, fraction = _with_holdout(train, has_val)
    if fraction and "data.holdout_fraction" in config.derive and isinstance(train.source, Files):
        check_level(root if holds_class_folders(root) else root / "train", train, fraction)
    return train, fraction


def _with_holdout(train: ImageSet, has_val: bool) -> tuple[ImageSet, float]:
    return train, 0.0 if has_val else 0.1 if len(train) >= 10_000 else 0.2


def _median_side(images: ImageSet) -> int:
    """Return the median of the shorter sides of a few images, evenly spaced."""
    sides = []
    for index in np.unique(np.linspace(0, len(images) - 1, NUM_SIZES, dtype=int)).tolist():
        try:
            sides.append(images.read(index, lambda image: min(image.size)))
        except UnreadableImage:
            continue  # training reports it
    if not sides:
        raise ConfigError(f"none of the images can be read, among them {printable(images.name(0))}")
    return int(np.median(sides))


def _image_size(config: TrainConfig, facts: Facts) -> Choice:
    if facts.source is not None and facts.source.image_size is not None:
        return facts.source.image_size, f"as {_source(config)}"
    if config.model.name not in OWN_MODELS and "model.name" not in config.derive:
        return None, ""  # timm's models are made for a size, usually 224 pixels
    largest, device = (MAX_SIZE_CUDA, "a GPU") if facts.has_cuda else (MAX_SIZE_CPU, "a CPU")
    step = 8 if min(facts.side, largest) <= SMALL_IMAGE else 32
    size = max(min(facts.side, largest) // step * step, 8)
    return size, f"the images' shorter sides have a median of {facts.side} pixels; {largest} at most on {device}"


def _source(config: TrainConfig) -> str:
    return f"model.pretrained={printable(str(config.model.pretrained))} has it"


def _model_key(name: str) -> Callable[[TrainConfig, Facts], Choice]:
    def rule(config: TrainConfig, facts: Facts) -> Choice:
        if facts.source is not None:
            if not facts.source.model and "model.name" in config.derive:
                raise ConfigError(
                    f"model.pretrained={printable(str(config.model.pretrained))}: does not say of which model it is; "
                    "add model=... and, if they are not the default, its keys"
                )
            return facts.source.model.get(name), f"as {_source(config)}"
        return _small_net(config, facts).get(name) or (None, "")

    return rule


def _small_net(config: TrainConfig, facts: Facts) -> dict[str, Choice]:
    """Return the keys of a net of a size that suits the images and the device."""
    choices: dict[str, Choice] = {"name": ("hybrid_resnet26", "the smallest net with attention; its stem convolves")}
    if config.model.name not in OWN_MODELS:
        return {}
    size, pixels = resolved_image_size(config.data), in_pixels(resolved_size(config.data))
    if size <= 32:
        stem = "attention_small" if config.model.name.startswith("sasa") else "conv_small"
        choices["stem"] = (stem, f"images of {pixels} are too small for a stem that pools")
    if size <= SMALL_IMAGE:
        choices["kernel_size"] = (5, f"a window that fits the small maps of images of {pixels}")
    if not facts.has_cuda or facts.num_images < 10_000:
        why = "on a CPU" if not facts.has_cuda else f"with {facts.num_images:,} images"
        choices["width"] = (0.25, f"a quarter of the channels, {why}")
        choices["num_heads"] = (4, "for the narrower layers")
    return choices


def _batch(config: TrainConfig, facts: Facts) -> Choice:
    trainer = config.trainer
    micro = trainer.micro_batch_size if isinstance(trainer.micro_batch_size, int) else trainer.grad_accum_steps
    unit = micro * world_size()
    most = min(facts.num_images // MIN_STEPS, MAX_BATCH)
    most = most // 8 * 8 if most >= 16 else max(most, 4 if facts.num_images >= 8 else 2)
    batch = max(most // unit, 1) * unit
    steps = facts.num_images // batch
    return batch, f"{steps:,} steps per epoch of {facts.num_images:,} images (at least {MIN_STEPS} where possible)"


def _epochs(config: TrainConfig, facts: Facts) -> Choice:
    per_epoch = max(facts.num_images // config.trainer.global_batch_size, 1)
    wanted, fewest, most = (STEPS_FINE, 5, 30) if facts.source is not None else (STEPS, 20, 100)
    epochs = min(max(-(-wanted // per_epoch), fewest), most)
    return epochs, f"{epochs * per_epoch:,} steps; the aim is {wanted:,}, within {fewest} to {most} epochs"


def _warmup(config: TrainConfig, facts: Facts) -> Choice:
    epochs = max(config.trainer.epochs // 10, 1) if config.trainer.epochs > 1 else 0
    return float(epochs), "a tenth of the epochs, at least 1" if epochs else "a single epoch has none"


def _lr(config: TrainConfig, facts: Facts) -> Choice:
    batch = config.trainer.global_batch_size
    base = 0.0005 if facts.source is not None else 0.002
    lr = base * (batch / 16) ** 0.5
    return float(f"{lr:.2g}"), f"{base:g} for 16 images per step, times the root of {batch} / 16"


def _layer_decay(config: TrainConfig, facts: Facts) -> Choice:
    return (0.85, "layers that are nearer to the image change less") if facts.source is not None else (None, "")


RULES: dict[str, Callable[[TrainConfig, Facts], Choice]] = {
    "data.image_size": _image_size,
    **{f"model.{name}": _model_key(name) for name in ("name", *MODEL_KEYS)},
    "trainer.global_batch_size": _batch,
    "trainer.epochs": _epochs,
    "schedule.warmup_epochs": _warmup,
    "optimizer.lr": _lr,
    "optimizer.layer_decay": _layer_decay,
}
