"""The rules that values must keep, alone and together; what breaks one is refused before data is loaded."""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from sasa_train.config.derived import crops_by_padding, micro_batch_size, resolved_image_size
from sasa_train.config.keys import (
    ARGUMENT_NAME,
    CHOICES,
    DIALS,
    FREE_KEYS,
    MAX_DEPTH,
    OWN_MODELS,
    PUBLISHED,
    SMALL_IMAGE,
    ModelConfig,
    TrainConfig,
    flatten,
    key_table,
)
from sasa_train.refusal import require


def validate(config: TrainConfig) -> None:
    """Raise ConfigError for values that break a rule or cannot go together; nothing is loaded yet."""
    flat = flatten(config)
    for key, value in flat.items():
        _validate_value(key, value, MAX_DEPTH if key in FREE_KEYS else 1)
    for key, choices in CHOICES.items():
        require(flat[key] in choices, key, flat[key], f"must be one of {', '.join(choices)}")
    for key in POSITIVE:
        require(flat[key] is None or flat[key] > 0, key, flat[key], "must be positive")
    for key in NOT_NEGATIVE:
        require(flat[key] is None or flat[key] >= 0, key, flat[key], "must not be negative")
    for key in FRACTIONS:
        holds = all(0 <= number < 1 for number in _leaves(flat[key]) if number is not None)
        require(holds, key, flat[key], "must be at least 0 and below 1")
    for key in config.allow_config_change:
        require(key in key_table(), "allow_config_change", key, "must name knobs, as in [trainer.epochs]")
    for key in PROBABILITIES:
        holds = all(0 <= number <= 1 for number in _leaves(flat[key]) if number is not None)
        require(holds, key, flat[key], "must be from 0 to 1")
    for key in RANGES:
        low, high = flat[key] if len(flat[key]) == 2 else (1, 0)
        require(0 < low <= high, key, flat[key], "must be [low, high] with 0 < low <= high")
    for key, limit in AT_MOST.items():
        largest = max(flat[key]) if isinstance(flat[key], list) else flat[key]
        require(largest is None or largest <= limit, key, flat[key], f"must be {limit} at most")
    _validate_model(config.model, resolved_image_size(config.data))
    _validate_data(config)
    _validate_batches(config)
    trainer = config.trainer
    clips = [key for key in ("grad_clip_norm", "grad_clip_value", "grad_clip_agc") if getattr(trainer, key)]
    require(len(clips) <= 1, "trainer.grad_clip_...", clips, "exclude each other: set one")
    require(
        config.schedule.warmup_epochs <= trainer.epochs,
        "schedule.warmup_epochs",
        config.schedule.warmup_epochs,
        f"must not exceed trainer.epochs={trainer.epochs}",
    )
    milestones = config.schedule.decay_milestones
    require(
        all(0 <= early <= late for early, late in itertools.pairwise([0.0, *milestones])),
        "schedule.decay_milestones",
        milestones,
        "must be epochs in ascending order, none negative",
    )
    _validate_names(config)


def _leaves(value: Any) -> Iterator[Any]:
    """A knob's value, or what its lists and dicts hold."""
    if not isinstance(value, dict | list):
        yield value
        return
    for part in value.values() if isinstance(value, dict) else value:
        yield from _leaves(part)


def _depth(value: Any) -> int:
    """How many lists and dicts are in one another."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((_depth(part) for part in (value.values() if isinstance(value, dict) else value)), default=0)


def _argument_names(value: Any) -> Iterator[Any]:
    """The keys of a knob's dicts, however deep."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _argument_names(part)


def _validate_value(key: str, value: Any, depth: int) -> None:
    """Refuse what makes sense in no knob, or in no list or argument of one."""
    require(_depth(value) <= depth, key, value, f"must not have more than {depth} lists or dicts in one another")
    for name in _argument_names(value):
        is_name = isinstance(name, str) and ARGUMENT_NAME.fullmatch(name)
        require(bool(is_name), key, value, f"must name arguments, as in {{rho:0.9}}: {name!a} is no name")
    for leaf in _leaves(value):
        _validate_leaf(key, value, leaf)


def _validate_leaf(key: str, value: Any, leaf: Any) -> None:
    if isinstance(leaf, str):
        require(leaf != "", key, repr(value), "must not be an empty text")
        is_plain = all(unicodedata.category(char) not in ("Cc", "Cs") for char in leaf)
        require(is_plain, key, ascii(value), "must be text without control characters or bytes that are no text")
        require("${" not in leaf, key, value, "must not hold ${ once it is composed; write the value itself")
    elif isinstance(leaf, float):
        fits = leaf == 0 or 1e-38 <= abs(leaf) <= 1e38
        require(fits, key, value, "must be finite, and 0 or of a size from 1e-38 to 1e38, which float32 holds")
    elif isinstance(leaf, int):
        require(abs(leaf) < 2**63, key, value, "must fit into 64 bits")
    else:
        require(leaf is None, key, value, "must hold numbers, texts, true, false or null alone")


def _validate_names(config: TrainConfig) -> None:
    """Names and paths that no file system would take."""
    paths = {"data.root": config.data.root, "output_dir": config.output_dir, "resume": config.resume}
    if config.model.pretrained is not None:
        paths["model.pretrained"] = config.model.pretrained
    for key, path in paths.items():
        fits = max(len(name.encode()) for name in path.split("/")) <= 255 and len(path.encode()) < 4096
        require(fits, key, path, "must be a path: 255 bytes a folder and 4,095 in all")
    if config.run_name is not None:
        require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]{0,199}", config.run_name) is not None,
            "run_name",
            config.run_name,
            "must be a plain folder name: letters, digits and _ . = , + -, 200 at most",
        )


POSITIVE = (
    "data.image_size",
    "data.worker_timeout",
    "data.max_train_images",
    "data.max_val_images",
    "model.kernel_size",
    "model.num_classes",
    "model.num_heads",
    "model.width",
    "optimizer.lr",
    "optimizer.layer_decay",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.global_batch_size",
    "trainer.grad_accum_steps",
    "trainer.eval_every_epochs",
    "trainer.grad_clip_norm",
    "trainer.grad_clip_value",
    "trainer.grad_clip_agc",
    "trainer.max_hours",
    "trainer.ema_decay",
    "trainer.log_every_steps",
    "trainer.checkpoint_every_steps",
    "schedule.decay_epochs",
)
NOT_NEGATIVE = (
    "seed",
    "data.num_workers",
    "augment.crop_padding",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.eps",
    "schedule.decay_rate",
    "schedule.warmup_epochs",
    "schedule.warmup_lr",
    "schedule.min_lr",
    "trainer.keep_checkpoints",
    "trainer.bn_recalibration_batches",
    "trainer.profile_steps",
    "augment.policy_ops",
    "augment.policy_magnitude",
    "augment.brightness",
    "augment.contrast",
    "augment.saturation",
    "augment.hue",
    "augment.mixup",
    "augment.cutmix",
    "augment.mix_off_epochs",
)
PROBABILITIES = (
    "augment.erasing_prob",
    "augment.mix_prob",
    "augment.mix_switch_prob",
    "data.max_unreadable",
    "data.mean",
)
RANGES = ("augment.crop_scale", "augment.crop_ratio", "augment.erasing_scale")
AT_MOST = {
    "augment.crop_scale": 1,
    "augment.erasing_scale": 1,
    "augment.hue": 0.5,
    "augment.policy_ops": 8,
    "augment.policy_magnitude": 30,
    "data.image_size": 2**14,  # Pillow and torch count the bytes of a larger image in more than 32 bits
    "data.num_workers": 1024,  # processes, which a machine runs out of
    "trainer.global_batch_size": 2**24,  # no data set here has more images
    "optimizer.layer_decay": 1,
}
FRACTIONS = (
    "data.holdout_fraction",
    "model.drop_path_rate",
    "model.bn_momentum",
    "optimizer.betas",
    "trainer.ema_decay",
    "trainer.label_smoothing",
)


def _validate_model(model: ModelConfig, image_size: int) -> None:
    require(
        model.pretrained != PUBLISHED or model.name not in OWN_MODELS,
        "model.pretrained",
        model.pretrained,
        f"is for timm's models: no weights of {model.name} are published; name a checkpoint or an export",
    )
    if model.name not in OWN_MODELS:
        for dial in DIALS:
            require(
                getattr(model, dial) is None,
                f"model.{dial}",
                getattr(model, dial),
                f"is a dial of our own models, which model.name={model.name} is not: leave it out, or choose one of "
                + ", ".join(OWN_MODELS),
            )
    require(
        model.kernel_size is None or model.kernel_size % 2 == 1,
        "model.kernel_size",
        model.kernel_size,
        "must be odd, so that the window has a centre",
    )
    require(
        model.kernel_size is None or model.kernel_size < 2 * image_size,
        "model.kernel_size",
        model.kernel_size,
        f"must be {2 * image_size - 1} at most for images of {image_size} pixels: no window reaches further",
    )


def _validate_batches(config: TrainConfig) -> None:
    trainer = config.trainer
    require(
        trainer.global_batch_size % trainer.grad_accum_steps == 0,
        "trainer.global_batch_size",
        trainer.global_batch_size,
        f"must be divisible by trainer.grad_accum_steps={trainer.grad_accum_steps}; the nearest that fit are "
        + " and ".join(str(n) for n in _nearest_multiples(trainer.global_batch_size, trainer.grad_accum_steps)),
    )
    if config.augment.mixup or config.augment.cutmix:
        off = config.augment.mix_off_epochs
        require(off < trainer.epochs, "augment.mix_off_epochs", off, f"must be below trainer.epochs={trainer.epochs}")
    micro = trainer.micro_batch_size
    if micro == "auto":
        accum = trainer.grad_accum_steps
        require(
            accum == 1, "trainer.grad_accum_steps", accum, "contradicts trainer.micro_batch_size=auto; set one of them"
        )
    _check_mixing(config, micro_batch_size(trainer, world_size=1))
    if micro in (None, "auto"):
        return
    fits = isinstance(micro, int) and micro > 0 and trainer.global_batch_size % micro == 0
    rule = f"must be auto or divide trainer.global_batch_size={trainer.global_batch_size}"
    require(fits, "trainer.micro_batch_size", repr(micro), rule)
    require(
        trainer.grad_accum_steps in (1, trainer.global_batch_size // int(micro or 1)),
        "trainer.grad_accum_steps",
        trainer.grad_accum_steps,
        f"contradicts trainer.micro_batch_size={micro}; set one of the two",
    )


def _validate_data(config: TrainConfig) -> None:
    data, augment = config.data, config.augment
    size = resolved_image_size(data)
    require(
        data.resident != "true" or crops_by_padding(data, augment),
        "data.resident",
        data.resident,
        f"needs images of {SMALL_IMAGE} pixels and less and augment.crop_mode=padded, but data.image_size={size}: a "
        "random-resized crop reads the originals; use data.resident=auto",
    )
    for name in ("mean", "std"):
        value = getattr(data, name)
        require(value is None or len(value) == 3, f"data.{name}", value, "must be three numbers, red, green and blue")
    require(data.std is None or min(data.std) > 0, "data.std", data.std, "must be positive")
    require(
        (augment.crop_padding or 0) <= size,
        "augment.crop_padding",
        augment.crop_padding,
        f"must not exceed data.image_size={size}, or crops would hold nothing of the image",
    )
    require(
        augment.crop_mode != "padded" or size <= SMALL_IMAGE,
        "augment.crop_mode",
        augment.crop_mode,
        f"is for images of {SMALL_IMAGE} pixels and less, but data.image_size={size}; use auto or resized",
    )


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """Refuse a global batch that so many processes cannot share. Not part of `validate`: a saved config may have been
    another number's.
    """
    trainer = config.trainer
    per_process, key = trainer.grad_accum_steps, "trainer.grad_accum_steps"
    if isinstance(trainer.micro_batch_size, int):
        per_process, key = trainer.micro_batch_size, "trainer.micro_batch_size"
    divisor = world_size * per_process
    require(
        trainer.global_batch_size % divisor == 0,
        "trainer.global_batch_size",
        trainer.global_batch_size,
        f"must be divisible by {world_size} processes x {key}={per_process}; the nearest that fit are "
        + " and ".join(str(n) for n in _nearest_multiples(trainer.global_batch_size, divisor)),
    )
    _check_mixing(config, micro_batch_size(trainer, world_size))


def _check_mixing(config: TrainConfig, micro_batch: int) -> None:
    require(
        micro_batch != 1 or not (config.augment.mixup or config.augment.cutmix),
        "micro-batches of",
        micro_batch,
        "image leave mixup and cutmix no other to mix with; use larger ones",
    )


def _nearest_multiples(value: int, divisor: int) -> list[int]:
    below = value // divisor * divisor
    return [n for n in (below, below + divisor) if n > 0]
