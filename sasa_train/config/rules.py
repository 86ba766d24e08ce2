"""Validation rules for single values and combinations of values, checked before any data is loaded."""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from difflib import get_close_matches
from operator import attrgetter
from typing import Any

from sasa_train.config.derived import (
    crops_by_padding,
    in_pixels,
    kernel_sizes,
    micro_batch_size,
    resolved_image_size,
    resolved_size,
    written_size,
)
from sasa_train.config.keys import (
    ARGUMENT_NAME,
    CLASS_WEIGHTS,
    DERIVABLE,
    FREE_KEYS,
    LOGGERS,
    MAX_DEPTH,
    MODEL_KEYS,
    MODES,
    OWN_MODELS,
    PUBLISHED,
    SMALL_IMAGE,
    TARGETS,
    TIMM_TEACHER,
    WEIGHTS_RULE,
    DataConfig,
    TrainConfig,
    TrainerConfig,
    flatten,
    key_table,
    names_source,
)
from sasa_train.refusal import ConfigError, require

URL_SETS = ("imagenet", "image_folder")
Rules = Iterator[tuple[bool, str, str]]  # whether the rule holds, the key, and the rule in words


def validate(config: TrainConfig) -> None:
    """Raise ConfigError for values that violate a rule or are incompatible."""
    _check_url(config.data)
    check_values(config)
    checks = (
        _of_code, _of_model, _of_lists, _of_data, _of_mode, _of_batches, _of_epochs, _of_imbalance, _of_distillation
    )  # fmt: skip
    for is_kept, key, rule in itertools.chain.from_iterable(check(config) for check in checks):
        require(is_kept, key, attrgetter(key)(config), rule)
    _check_mixing(config, micro_batch_size(config.trainer, world_size=1))


def check_values(config: TrainConfig) -> None:
    """Raise ConfigError for values that are invalid whatever the other values are."""
    for key, value in flatten(config).items():
        _check_content(key, value, value)
    check_bounds(config)
    for is_kept, key, rule in itertools.chain(
        _of_single_keys(config), _of_class_weights(config), _of_clipping(config.trainer), _of_freezing(config.trainer)
    ):
        require(is_kept, key, attrgetter(key)(config), rule)
    for name in config.allow_config_change:
        require(name in key_table(), "allow_config_change", name, "must name keys, as in [trainer.epochs]")
    for name in config.logger:
        hint = "".join(f"; did you mean {close}?" for close in get_close_matches(name.lower(), LOGGERS, n=1))
        require(name in LOGGERS, "logger", name, f"must name some of {', '.join(LOGGERS)}{hint}")
        require(config.logger.count(name) == 1, "logger", config.logger, "must name each once")
    for name in config.derive:
        require(name in DERIVABLE, "derive", name, f"must name keys among {', '.join(DERIVABLE)}")


def check_bounds(config: Any, prefix: str = "") -> None:
    """Raise ConfigError if a value is outside its key's bounds."""
    values = flatten(config, prefix)
    for key, field in key_table(type(config), prefix).items():
        bounds, value = field.metadata["bounds"], values[key]
        if bounds is not None and value is not None:
            require(bounds.hold(value), key, value, f"must be {bounds}")


def _check_content(key: str, value: Any, part: Any, depth: int = 0) -> None:
    """Raise ConfigError for content that no key accepts; `part` is nested `depth` levels inside `value`."""
    if isinstance(part, dict | list):
        limit = MAX_DEPTH if key in FREE_KEYS else 1
        require(depth < limit, key, value, f"must not have more than {limit} lists or dicts in one another")
        for name in part if isinstance(part, dict) and key == CLASS_WEIGHTS else ():
            _check_content(key, value, name, depth + 1)
            require(name != "???", key, value, "must not name the class ???, which YAML takes for a missing value")
        for name in part if isinstance(part, dict) and key != CLASS_WEIGHTS else ():
            is_name = isinstance(name, str) and ARGUMENT_NAME.fullmatch(name)
            require(bool(is_name), key, value, f"must name arguments, as in {{rho:0.9}}: {name!a} is not a name")
        for inner in part.values() if isinstance(part, dict) else part:
            _check_content(key, value, inner, depth + 1)
    elif isinstance(part, str):
        require(part != "", key, repr(value), "must not be an empty text")
        is_plain = all(unicodedata.category(char) not in ("Cc", "Cs") for char in part)
        require(is_plain, key, ascii(value), "must be text without control characters or bytes that are not text")
        require("${" not in part, key, value, "must not hold ${ once it is composed; write the value itself")
    elif isinstance(part, float):
        fits = part == 0 or 1e-38 <= abs(part) <= 1e38
        require(fits, key, value, "must be finite, and 0 or of a size from 1e-38 to 1e38, which float32 holds")
    elif isinstance(part, int):
        require(abs(part) < 2**63, key, value, "must fit into 64 bits")
    else:
        require(part is None, key, value, "must hold numbers, texts, true, false or null alone")


def _of_single_keys(config: TrainConfig) -> Rules:
    data, milestones = config.data, config.schedule.decay_milestones
    is_odd = all(size % 2 == 1 for size in kernel_sizes(config.model))
    yield is_odd, "model.kernel_size", "must be odd, so that the window has a centre"
    scale = config.model.scale
    is_scale = scale in (None, "inverse_sqrt") or (isinstance(scale, float) and scale > 0)
    yield is_scale, "model.scale", "must be a positive number, or inverse_sqrt, 1/sqrt(head_dim)"
    for name, value in {"mean": data.mean, "std": data.std}.items():
        rule = "must be three numbers, red, green and blue, or one for grey images"
        yield value is None or len(value) in (1, 3), f"data.{name}", rule
    rule = "must be of values in [0, 1], so 1 at most; divide numbers for values from 0 to 255 by 255"
    yield data.std is None or max(data.std) <= 1, "data.std", rule
    bounds = data.value_range
    rule = "must be [low,high] with low < high"
    yield bounds is None or (len(bounds) == 2 and bounds[0] < bounds[1]), "data.value_range", rule
    rule = "must be a CSS colour's name (white), #rrggbb, or none"
    yield data.background in ("white", "none") or _is_colour(data.background), "data.background", rule
    ascends = all(0 <= early <= late for early, late in itertools.pairwise([0.0, *milestones]))
    yield ascends, "schedule.decay_milestones", "must be epochs in ascending order, none negative"


def _of_freezing(trainer: TrainerConfig) -> Rules:
    names = trainer.train_only
    rule = "must name a parameter or a module, as in [classifier]; null trains all"
    yield names is None or len(names) > 0, "trainer.train_only", rule
    rule = "must hold no brackets: [...] is no pattern here"
    yield not any("[" in name or "]" in name for name in names or ()), "trainer.train_only", rule
    rule = "would change batch norms that trainer.train_only keeps as they are; use 0"
    yield names is None or trainer.bn_recalibration_batches == 0, "trainer.bn_recalibration_batches", rule


def _of_class_weights(config: TrainConfig) -> Rules:
    # 0 is refused: a batch of such images alone has no mean. Images that are not to count can be left out.
    weights = config.trainer.class_weights
    values = list(weights.values()) if isinstance(weights, dict) else []
    is_valid = weights in (None, "balanced") or (bool(values) and all(type(w) is float for w in values))
    yield is_valid and all(1e-6 <= weight <= 1e6 for weight in values), CLASS_WEIGHTS, WEIGHTS_RULE


def _of_imbalance(config: TrainConfig) -> Rules:
    trainer = config.trainer
    rule = "is for the losses that trainer.loss names; your own (trainer.loss_target) weighs its images itself"
    yield trainer.class_weights is None or trainer.loss_target is None, CLASS_WEIGHTS, rule
    rule = "needs trainer.class_weights=balanced: weights that are given are taken as they are"
    yield trainer.class_weights_power == 1 or trainer.class_weights == "balanced", "trainer.class_weights_power", rule
    rule = "needs trainer.loss=focal"
    yield trainer.focal_gamma == TrainerConfig().focal_gamma or trainer.loss == "focal", "trainer.focal_gamma", rule


def _of_clipping(trainer: TrainerConfig) -> Rules:
    clips = [key for key in ("grad_clip_norm", "grad_clip_value", "grad_clip_agc") if getattr(trainer, key)]
    for first, second in itertools.pairwise(clips):
        yield False, f"trainer.{second}", f"and trainer.{first} exclude each other: set one"


def _of_code(config: TrainConfig) -> Rules:
    model, data, trainer = config.model, config.data, config.trainer
    for key in TARGETS:
        names = attrgetter(key)(config) or []
        names = names if isinstance(names, list) else [names]
        rule = "must be a dotted name of your own code, as in my_models.TinyNet"
        yield all(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) for name in names), key, rule
    rule = "and data.name=own (data=own) need each other"
    yield (data.name == "own") == (data.target is not None), "data.target", rule
    rule = "needs data.target or data.dataset: it holds the arguments of these"
    yield not data.args or data.name in ("own", "torchvision", "hf"), "data.args", rule
    rule = "is for data.root; your own function (data.target) chooses its val set itself"
    yield data.split is None or data.target is None, "data.split", rule
    rule = "is for the losses that trainer.loss names; your own (trainer.loss_target) gets the labels as they are"
    yield trainer.label_smoothing == 0 or trainer.loss_target is None, "trainer.label_smoothing", rule
    is_ours = model.name in OWN_MODELS and model.target is None
    rule = f"is for timm's models and your own (model.target); {model.name} has keys: {', '.join(MODEL_KEYS)}"
    yield not model.args or not is_ours, "model.args", rule
    rule = "is for models with names; give it to your own in model.args"
    yield model.drop_path_rate == 0 or model.target is None, "model.drop_path_rate", rule


def _of_model(config: TrainConfig) -> Rules:
    model, image_size = config.model, resolved_image_size(config.data)
    is_ours, name = model.name in OWN_MODELS and model.target is None, model.title
    rule = f"is for timm's models: no weights of {name} are published; name a checkpoint or an export"
    yield not (is_ours or model.target) or model.pretrained != PUBLISHED, "model.pretrained", rule
    rule = f"is a key of our own models, which {name} is not: leave it out, or choose one of "
    for key in () if names_source(name) else MODEL_KEYS:  # the source may be one of our own
        yield is_ours or getattr(model, key) is None, f"model.{key}", rule + ", ".join(OWN_MODELS)
    limits = {"kernel_size": 2 * image_size - 1, "dilation": max(image_size - 1, 1)}
    for key, value in (("kernel_size", max(kernel_sizes(model), default=1)), ("dilation", model.dilation or 1)):
        rule = f"must be {limits[key]} at most for images of {in_pixels(resolved_size(config.data))}: "
        yield value <= limits[key], f"model.{key}", rule + "no window reaches further"


def _of_lists(config: TrainConfig) -> Rules:
    data = config.data
    is_list, is_named = data.name == "list", data.name in ("torchvision", "hf")
    yield is_list or data.train is None, "data.train", "is for data=list"
    yield is_list or data.val is None, "data.val", "is for data=list"
    yield not is_list or (data.train or data.val) is not None, "data.train", "must name a CSV file for data=list"
    rule = "must name two columns, those of images and labels, as in [path,label]"
    yield len(set(data.columns)) == len(data.columns) == 2, "data.columns", rule
    rule = "is for data=list and data=hf"
    yield is_list or data.name == "hf" or data.columns == TrainConfig().data.columns, "data.columns", rule
    rule = f"takes val from train, but data.val={data.val} is val: set one (data.val=null or data.holdout_fraction=0)"
    yield data.val is None or data.holdout_fraction == 0, "data.holdout_fraction", rule
    yield not is_list or data.split is None, "data.split", "is for data.root; a list is chosen by data.val"
    yield is_list or data.root is not None, "data.root", "must be a folder; only for data=list may it be null"
    yield is_named or data.dataset is None, "data.dataset", "is for data=torchvision and data=hf"
    rule = f"and data.name={data.name} (data={data.name}) need each other"
    yield not is_named or data.dataset is not None, "data.dataset", rule
    rule = "must be a class of torchvision.datasets, as in Flowers102"
    yield data.name != "torchvision" or str(data.dataset).isidentifier(), "data.dataset", rule


def _check_url(data: DataConfig) -> None:
    """Raise ConfigError for a URL that is not taken; the message does not repeat what may hold a password."""
    if not data.is_remote:
        return
    place = data.folder.partition("://")[2]
    if "@" in place.partition("/")[0]:
        raise ConfigError(
            "data.root: a URL must not contain a user or a password, which would be stored with the run; put them into "
            "~/.netrc"
        )
    if not place or any(mark in data.folder for mark in ("?", "#", "::", "@")):
        raise ConfigError("data.root: a URL must be that of a folder, as in https://host/flowers, without ? # @ and ::")
    require(data.name in URL_SETS, "data.root", data.root, f"is a URL, which {' and '.join(URL_SETS)} alone take")


def _of_data(config: TrainConfig) -> Rules:
    data, augment, sides = config.data, config.augment, resolved_size(config.data)
    size = written_size(*sides)
    small = f"images of {SMALL_IMAGE} pixels and less"
    rule = f"needs {small} and augment.crop_mode=padded, but data.image_size={size}: a random-resized crop reads the "
    rule += "originals; use data.resident=auto"
    yield data.resident != "true" or crops_by_padding(data, augment), "data.resident", rule
    rule = f"needs a split of its own, but data.holdout_fraction={data.holdout_fraction} takes val from train: set one"
    yield data.split is None or data.holdout_fraction == 0, "data.split", rule
    rule = "is for sets with a test split: the digits have train and val alone"
    yield data.split != "test" or data.name != "digits", "data.split", rule
    yield data.value_range is None or not data.clip_values, "data.value_range", "needs data.clip_values=false"
    rule = f"must not exceed data.image_size={size}, or crops would hold nothing of the image"
    yield (augment.crop_padding or 0) <= min(sides), "augment.crop_padding", rule
    rule = f"is for {small}, but data.image_size={size}; use auto or resized"
    yield augment.crop_mode != "padded" or max(sides) <= SMALL_IMAGE, "augment.crop_mode", rule


def _of_mode(config: TrainConfig) -> Rules:
    model, data, augment = config.model, config.data, config.augment
    channels, of_mode = MODES[data.mode], f"data.mode={data.mode}"
    rule = "is for models with names; give it to your own in model.args"
    yield model.in_chans is None or model.target is None, "model.in_chans", rule
    rule = f"must be {channels}, the channels of {of_mode}; leave it out, or choose another data.mode"
    yield model.in_chans in (None, channels), "model.in_chans", rule
    for name, value in {"mean": data.mean, "std": data.std}.items():
        rule = f"must be {'three numbers' if channels == 3 else 'one number, as in [0.5],'} for {of_mode}"
        yield value is None or len(value) == channels, f"data.{name}", rule
    rule = f"does nothing to grey images ({of_mode}); leave it out"
    for name in ("saturation", "hue"):
        yield data.mode == "rgb" or getattr(augment, name) == 0, f"augment.{name}", rule
    if data.mode == "grey16":
        rule = "is defined for images of 8 bits alone; leave it out, or use data.mode=grey"
        yield augment.policy == "none", "augment.policy", rule
        yield augment.target is None, "augment.target", rule
        for name in ("brightness", "contrast"):
            yield getattr(augment, name) == 0, f"augment.{name}", rule
        rule = "must be false for data.mode=grey16, which keeps all bits; set data.value_range instead"
        yield not data.clip_values, "data.clip_values", rule


def _is_colour(text: str) -> bool:
    from PIL import ImageColor  # imported only for other colours than the default, so that `--help` is fast

    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False


def _of_batches(config: TrainConfig) -> Rules:
    trainer = config.trainer
    images, micro, steps = trainer.global_batch_size, trainer.micro_batch_size, trainer.grad_accum_steps
    rule = f"must be divisible by trainer.grad_accum_steps={steps}; {_nearest_multiples(images, steps)}"
    yield images % steps == 0, "trainer.global_batch_size", rule
    if micro is None:
        return
    fits = micro == "auto" or (isinstance(micro, int) and micro > 0 and images % micro == 0)
    yield fits, "trainer.micro_batch_size", f"must be auto or divide trainer.global_batch_size={images}"
    agrees = steps == 1 or (isinstance(micro, int) and steps == images // micro)
    yield agrees, "trainer.grad_accum_steps", f"contradicts trainer.micro_batch_size={micro}; set one of the two"


def _of_epochs(config: TrainConfig) -> Rules:
    trainer, augment, schedule = config.trainer, config.augment, config.schedule
    is_mixing = augment.mixup or augment.cutmix
    rule = f"must be below trainer.epochs={trainer.epochs}"
    yield not is_mixing or augment.mix_off_epochs < trainer.epochs, "augment.mix_off_epochs", rule
    rule = "is for trainer.patience, which is not set"
    yield trainer.min_delta == 0 or trainer.patience is not None, "trainer.min_delta", rule
    rule = f"must not exceed trainer.epochs={trainer.epochs}"
    yield schedule.warmup_epochs <= trainer.epochs, "schedule.warmup_epochs", rule


def _of_distillation(config: TrainConfig) -> Rules:
    distill, defaults = config.distill, TrainConfig().distill
    for name in ("weight", "kind", "temperature"):
        is_default = getattr(distill, name) == getattr(defaults, name)
        rule = "does nothing without distill.teacher; leave it out, or name a teacher"
        yield distill.teacher is not None or is_default, f"distill.{name}", rule
    is_soft = distill.kind == "soft" or distill.temperature == defaults.temperature
    yield is_soft, "distill.temperature", f"is for distill.kind=soft, not {distill.kind}; leave it out"
    rule = "must be timm:NAME or timm:NAME.TAG, as in timm:resnet50.a1_in1k"
    yield distill.teacher != TIMM_TEACHER, "distill.teacher", rule
    rule = "counts the student's memory alone; with distill.teacher, give a number"
    is_auto = config.trainer.micro_batch_size == "auto"
    yield distill.teacher is None or not is_auto, "trainer.micro_batch_size", rule


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError if the global batch cannot be divided among `world_size` processes."""
    # Not part of `validate`, because a saved config may come from a run with another number of processes.
    trainer = config.trainer
    key = "micro_batch_size" if isinstance(trainer.micro_batch_size, int) else "grad_accum_steps"
    images, per_process = trainer.global_batch_size, getattr(trainer, key)
    divisor = world_size * per_process
    rule = f"must be divisible by {world_size} processes x trainer.{key}={per_process}; "
    require(images % divisor == 0, "trainer.global_batch_size", images, rule + _nearest_multiples(images, divisor))
    _check_mixing(config, micro_batch_size(trainer, world_size))


def _check_mixing(config: TrainConfig, micro_batch: int) -> None:
    alone = micro_batch == 1 and (config.augment.mixup or config.augment.cutmix)
    rule = "image leave mixup and cutmix no other to mix with; use larger ones"
    require(not alone, "micro-batches of", micro_batch, rule)


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return "the nearest that fit are " + " and ".join(str(n) for n in (below, below + divisor) if n > 0)
