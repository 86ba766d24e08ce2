"""Build a model (ours or timm's) from its config, and check before training that it suits the data."""

import copy
import math
import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch import nn

import sasa_train.models.resnet  # noqa: F401  (registers our models with timm)
from sasa_train.config import own_code
from sasa_train.config.derived import InputSize, as_image_size, as_input_size, in_pixels, written_size
from sasa_train.config.keys import MODEL_KEYS, PUBLISHED, ModelConfig
from sasa_train.models.arguments import check_args, check_reserved, written
from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, shorten

# Names, arguments and input sizes that `check_args` has accepted; it builds a model several times, and a command checks
# the same one several times.
_accepted: set[tuple[str, str, InputSize]] = set()


def build_model(config: ModelConfig, num_classes: int, size: int | InputSize) -> nn.Module:
    """Build the model `config.name` for `num_classes` classes and images of (channels, height, width) `size`.

    A number as `size` stands for square RGB images of this width.

    Raises:
        ConfigError: the name is unknown or the keys are incompatible.
    """
    is_own = config.target is not None
    model = _build_own(config, num_classes) if is_own else _build_named(config, num_classes, as_input_size(size))
    if config.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = config.bn_momentum
    return model


def _build_own(config: ModelConfig, num_classes: int) -> nn.Module:
    what = f"model.target={config.target}"
    make = own_code.load("model.target", str(config.target))
    with own_code.errors_of(what):
        model = make(num_classes=num_classes, **config.args)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what}: must return a torch.nn.Module, but returned {type(model).__name__}")
    return model


def _build_named(config: ModelConfig, num_classes: int, size: InputSize) -> nn.Module:
    check_name(config.name)
    check_reserved(config.name, config.args, is_sized(config.name))
    try:
        return _create(config, num_classes, size, copy.deepcopy(config.args))
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"model.name={_with_args(config, MODEL_KEYS)}: {error}") from error


def check_name(name: str) -> None:
    """Raise ConfigError for a name, or a tag behind it, that is not in timm's registry."""
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(name):
        close = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        hub = f"; a model of the Hugging Face hub: model.name=hf-hub:{name}" if "/" in name else ""
        raise ConfigError(
            f"model.name={name} is not in timm's registry: {hint} (one of your own: imports=[...] registers it){hub}"
        )
    tagged = list(get_arch_pretrained_cfgs(architecture))
    if tag and name not in tagged:
        tags = [known for known in tagged if known != architecture]
        close = get_close_matches(name, tags, n=1, cutoff=0)
        hint = f"did you mean {close[0]}?" if close else f"it has none: model.name={architecture}"
        raise ConfigError(f"model.name={name}: timm has no weights of that name: {hint}")


def _create(config: ModelConfig, num_classes: int, size: InputSize, args: dict[str, Any]) -> nn.Module:
    kwargs = {key: getattr(config, key) for key in MODEL_KEYS if getattr(config, key) is not None}
    if config.drop_path_rate:
        kwargs["drop_path_rate"] = config.drop_path_rate
    if size[0] != 3:
        kwargs["in_chans"] = size[0]
    kwargs |= _sized(config.name, size)
    return timm.create_model(config.name, num_classes=num_classes, **kwargs, **args)


def _with_args(config: ModelConfig, names: Sequence[str] = ()) -> str:
    """Return the model's name with those of its keys in `names` that are set, and its arguments."""
    keys = {key: value for key in names if (value := getattr(config, key)) is not None}
    given = [f"model.{key}={written(value)}" for key, value in keys.items()]
    if config.args:
        given.append(f"model.args={shorten(written(config.args))}")
    return f"{config.name} with {' '.join(given)}" if given else config.name


def build_published(name: str, size: InputSize, source: str | None = None) -> nn.Module:
    """Build a timm model with its published weights and classes, without changing the state of torch's generator.

    source: a hub folder or repository whose weights, classes and arguments are taken instead, for timm's create_model.

    Raises:
        ConfigError: the requested weights do not exist, or they are neither cached nor downloadable.
    """
    check_name(name)
    if source is None and not timm.is_model_pretrained(name):
        raise ConfigError(f"model.pretrained=timm: timm has no weights of {name}: see timm.list_pretrained()")
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(source or name, pretrained=True, **_sized(name, size))
    except Exception as error:  # the errors of urllib, httpx and huggingface_hub have no common base class
        reason = shorten((str(error).splitlines() or [""])[0])
        where = "they come from the Hugging Face hub or its cache ($HF_HOME): run once where there is a network,"
        if source is not None and source.startswith("local-dir:"):
            where = "put them into the folder, as model.safetensors,"
        raise ConfigError(
            f"model.pretrained={source or PUBLISHED}: the weights of {name} cannot be had ({type(error).__name__}: "
            f"{reason}); {where} or name a file"
        ) from error


def _sized(name: str, size: InputSize) -> dict[str, Any]:
    """Return the extra arguments required by models that are built for a fixed image size, such as vit and swin."""
    return {"img_size": as_image_size(*size[1:])} if is_sized(name) else {}


def is_sized(name: str) -> bool:
    """Return whether a model is built for a fixed image size."""
    # A model that the user has registered may have no timm configuration.
    return bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))


def enable_grad_checkpointing(model: nn.Module) -> None:
    """Enable gradient checkpointing, which recomputes activations in the backward pass.

    Raises:
        ConfigError: the model does not support gradient checkpointing.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError) as error:
        raise ConfigError(f"trainer.grad_checkpointing=true: {type(model).__name__} cannot do it ({error})") from error


def check_model(config: ModelConfig, size: int | InputSize, num_classes: int | None = None) -> nn.Module:
    """Build the model and run it on the meta device, which needs neither weights nor data; return the model.

    size: see `build_model`.
    num_classes: if it is None, the config's or, because the images are not known yet, 10.

    Raises:
        ConfigError: the model cannot be built, or it does not accept images of this size.
    """
    size = as_input_size(size)
    if config.target is not None:
        return _check_own(config, size, num_classes or config.num_classes or 10)
    if config.args:
        _check_args(config, size)
    try:
        return _run_on_meta(config, size, num_classes)
    except ConfigError as error:
        widths = [f"{width:g}" for width in _widths_that_work(config, size)] if "num_heads" in str(error) else []
        remedy = f"; model.width={' or '.join(widths)} works" if widths else ""
        raise ConfigError(f"{error}{remedy}") from error
    except LIBRARY_ERRORS as error:
        reason = f": {str(error) or _failed_line(error)}"
        sizes = [written_size(*found[1:]) for found in _sizes_that_work(config, size)]
        remedy = f"; data.image_size={' or '.join(sizes)} works" if sizes else ""
        raise ConfigError(
            f"model.name={_with_args(config)} cannot take images of {in_pixels(size)}{reason}{remedy}; choose "
            "another data.image_size or model"
        ) from error


def check_val_size(config: ModelConfig, size: InputSize, val_size: InputSize) -> None:
    """Raise ConfigError if the model, which is built for images of `size`, takes no others, of `val_size`."""
    if val_size == size:
        return
    key = f"data.val_image_size={written_size(*val_size[1:])}"
    num_classes = config.num_classes or 10

    def logits_on(device: str) -> Any:
        with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return build_model(config, num_classes, size).eval()(torch.zeros(1, *val_size))

    try:
        try:
            logits = logits_on("meta")
        except Exception:  # such as .item() of a tensor without a value
            if config.target is None:
                raise
            logits = logits_on("cpu")
    except Exception as error:  # a model of the user's own may raise anything
        raise ConfigError(
            f"{key}: {config.title} is built for images of {in_pixels(size)} (data.image_size) and does not take "
            f"others ({shorten(error) or type(error).__name__}); leave data.val_image_size out, or choose another model"
        ) from error
    _check_logits(f"{config.title}, with {key}", logits, num_classes)


def _check_args(config: ModelConfig, size: InputSize) -> None:
    key = (config.name, written(config.args), size)
    if key in _accepted:
        return
    check_name(config.name)
    check_reserved(config.name, config.args, is_sized(config.name))

    def create(args: dict[str, Any]) -> nn.Module:
        with torch.device("meta"), torch.no_grad():
            return _create(config, config.num_classes or 10, size, args)

    check_args(config.name, config.args, create)
    _accepted.add(key)


def _check_own(config: ModelConfig, size: InputSize, num_classes: int) -> nn.Module:
    """Do the same for a model of the user's own, which may need the CPU to be built."""
    what, images = f"model.target={config.target}", (1, *size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = _build_own(config, num_classes)
                logits = model.eval()(torch.empty(images))
        except Exception:  # such as .item() of a tensor without a value
            with own_code.errors_of(f"{what}, on an image of {in_pixels(size)}"):
                model = _build_own(config, num_classes)
                logits = model.eval()(torch.zeros(images))
    _check_logits(what, logits, num_classes)
    return model


def _run_on_meta(config: ModelConfig, size: InputSize, num_classes: int | None = None) -> nn.Module:
    num_classes = num_classes or config.num_classes or 10
    with torch.device("meta"), torch.no_grad():
        model = build_model(config, num_classes, size)
        logits = model.eval()(torch.empty(1, *size))
    _check_logits(f"model.name={_with_args(config)}", logits, num_classes)
    return model


def _check_logits(what: str, logits: Any, num_classes: int) -> None:
    """Raise ConfigError if a model that got one image has returned anything but its logits."""
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [1, num_classes]:
        raise ConfigError(f"{what}: must return logits [1, {num_classes}] for one image, but returned {shape}")


def _sizes_that_work(config: ModelConfig, size: InputSize) -> list[InputSize]:
    """Return the nearest smaller and larger size that the model accepts, among some round numbers."""
    channels, *sides = size
    if sides[0] == sides[1]:
        side = sides[0]
        below = [(n, n) for n in range((side - 1) // 8 * 8, max(7, side - 65), -8)]
        above = [(n, n) for n in (*range(side // 8 * 8 + 8, side + 65, 8), *range(side // 64 * 64 + 128, 577, 64))]
    else:
        units = [unit for unit in (4, 8, 16, 32, 64, 128) if unit <= min(sides)]
        below = [(sides[0] // unit * unit, sides[1] // unit * unit) for unit in units]
        above = [(-(-sides[0] // unit) * unit, -(-sides[1] // unit) * unit) for unit in units]
    shapes = ([(channels, *pair) for pair in pairs] for pairs in (below, above))
    return [found for found in (next(filter(partial(_accepts, config), some), None) for some in shapes) if found]


def _widths_that_work(config: ModelConfig, size: InputSize) -> list[float]:
    """Return the nearest smaller and larger width, among multiples of 1/16 near the given one, that can be built."""
    if config.width is None:
        return []
    unit = math.floor(16 * config.width)
    near = ([n / 16 for n in counts] for counts in (range(unit, max(0, unit - 8), -1), range(unit + 1, unit + 9)))
    found = (next((w for w in widths if _accepts(replace(config, width=w), size)), None) for widths in near)
    return [width for width in found if width is not None]


def _failed_line(error: Exception) -> str:
    """Return the line of the model's code that failed, for an error without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    of_model = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename]
    return (of_model or frames)[-1].line or type(error).__name__


def _accepts(config: ModelConfig, size: InputSize) -> bool:
    try:
        _run_on_meta(config, size)
    except (ConfigError, *LIBRARY_ERRORS):
        return False
    return True
