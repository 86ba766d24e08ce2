"""The preprocessing that pretrained weights expect: what their source states, and a config that takes it."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from sasa_train.config.derived import one_channel, resolved_image_size, resolved_interpolation
from sasa_train.config.keys import MODES, SMALL_IMAGE, DataConfig, TrainConfig
from sasa_train.config.overrides import as_written
from sasa_train.config.rules import validate
from sasa_train.config.saved import TAKEN
from sasa_train.data.datasets import mean_std
from sasa_train.data.decoding import Decoding
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable, warn

READING = [field.name for field in dataclasses.fields(Decoding)]  # keys of data without a null, so never taken
PER_CHANNEL = ("mean", "std")
CROP_MODE = "crop_mode"  # timm's; our val crop is its "center"
Stated = dict[str, Any]  # CROP_MODE, READING and other keys of data, with values from a source, not checked yet


def stated_by_config(data: DataConfig) -> Stated:
    """Return the preprocessing of a model trained by sasa_train."""
    mean, std = mean_std(data)
    stated = {"mean": list(mean), "std": list(std), "interpolation": resolved_interpolation(data)}
    stated |= {name: getattr(data, name) for name in READING}
    # Without a value, the source has the default crop, as does a run that takes none.
    return stated if data.val_crop is None else stated | {"val_crop": data.val_crop}


def stated_by_timm(described: Mapping[str, Any]) -> Stated:
    """Return the preprocessing in timm's words: a model's `pretrained_cfg`, or the arguments of timm's train.py."""
    found = {key: described.get(key) for key in ("mean", "std", "interpolation", CROP_MODE)}
    found["val_crop"] = described.get("crop_pct")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    return {key: value for key, value in plain.items() if value not in (None, "")}


def stated_by_json(text: str | bytes) -> Stated:
    """Return the preprocessing in timm's config.json, or nothing if the text is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    described = found.get("pretrained_cfg", found) if isinstance(found, dict) else None
    return stated_by_timm(described) if isinstance(described, dict) else {}


def with_preprocessing(config: TrainConfig, stated: Stated) -> tuple[TrainConfig, str]:
    """Set the keys in `TAKEN` that are null to what the source of `model.pretrained` states; also return a report line.

    Warns of stated values that are invalid or unknown here, and of keys that are set to something else; those in
    `READING` are never taken.
    """
    source, data, followed = f"model.pretrained={printable(str(config.model.pretrained))}", config.data, []
    for name in _names(config, stated):
        theirs = stated[name]
        try:
            value = _checked(config, name, _fitting(theirs, MODES[config.data.mode]) if name in PER_CHANNEL else theirs)
        except ConfigError as error:
            why = printable(shorten(error))
            warn(f"{source} states a preprocessing that is not taken: {why}; set data.{name} yourself")
            continue
        given = getattr(config.data, name)
        if given in (None, value):
            data = dataclasses.replace(data, **{name: value})
            how = "" if theirs == value else "the mean of" if len(value) == 1 else "repeating"
            followed.append(f"data.{name}={as_written(value)}" + (f" ({how} {as_written(theirs)})" if how else ""))
        else:
            warn(
                f"data.{name}={as_written(given)}, but {source} was trained with {as_written(value)}; leave "
                f"data.{name} out to take that"
            )
    for name in READING:
        if name in stated and (given := getattr(config.data, name)) != stated[name]:
            theirs, ours = (f"data.{name}={as_written(value)}" for value in (stated[name], given))
            warn(
                f"{source} was trained with {theirs}, but this run reads images with {ours}; add {theirs} to read alike"
            )
    if (mode := stated.get(CROP_MODE, "center")) != "center":
        warn(f"{source} was trained with crop_mode={printable(shorten(mode))}; val keeps the centre of each image here")
    config = dataclasses.replace(config, data=data)
    line = f"preprocessing of the source: {' '.join(followed)}" if followed else _own(config)
    return config, textwrap.fill(line, 108, subsequent_indent="    ", break_long_words=False)


def _own(config: TrainConfig) -> str:
    mean, std = (as_written(list(values)) for values in mean_std(config.data))
    return f"no preprocessing is taken from the source; this run's: data.mean={mean} data.std={std}"


def _names(config: TrainConfig, stated: Stated) -> list[str]:
    names = [name for key in TAKEN if (name := key.removeprefix("data.")) in stated]
    is_small = resolved_image_size(config.data) <= SMALL_IMAGE
    return [name for name in names if name != "val_crop" or not is_small]  # small images have no such crop


def _fitting(theirs: Any, channels: int) -> Any:
    """Convert the numbers of another number of channels: those of colours to their mean, that of grey to all three."""
    is_numbers = isinstance(theirs, list) and all(type(number) in (int, float) for number in theirs)
    if not is_numbers or len(theirs) not in (1, 3) or len(theirs) == channels:
        return theirs
    return [one_channel(theirs)] if channels == 1 else theirs * 3


def _checked(config: TrainConfig, name: str, value: Any) -> Any:
    """Return a stated value with the type of its key; raise ConfigError if the key does not accept it."""
    if name != "interpolation":
        is_list = name in PER_CHANNEL
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, list) != is_list or not all(type(number) in (int, float) for number in numbers):
            rule = "a list of numbers" if is_list else "a number"
            raise ConfigError(f"data.{name}={shorten(value)} must be {rule}")
    validate(dataclasses.replace(config, data=dataclasses.replace(config.data, **{name: value})))
    if isinstance(value, list):
        return [float(number) for number in value]
    return value if isinstance(value, str) else float(value)
