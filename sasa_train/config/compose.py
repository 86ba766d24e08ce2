"""Compose `configs/train.yaml` and command-line overrides into a validated TrainConfig, using Hydra.

Hydra's compose API is called instead of its decorator, so that an invalid config results in a message and exit code 2.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from sasa_train.config.groups import config_dir
from sasa_train.config.keys import FREE_KEYS, TrainConfig, flatten, key_table
from sasa_train.config.overrides import UNREADABLE, as_written, check_override_keys, unknown_key, with_free_keys
from sasa_train.config.rules import validate
from sasa_train.refusal import ConfigError, shorten

ConfigStore.instance().store(name="schema", node=TrainConfig)


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Compose `configs/train.yaml` with Hydra overrides and validate the result.

    Raises:
        ConfigError: a key or group is unknown, a value has the wrong type, or values are incompatible.
    """
    check_override_keys(overrides)
    of_sweep = GlobalHydra.instance().hydra  # a job of -m needs it again afterwards
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("train", overrides=with_free_keys(overrides))
    except UNREADABLE as error:
        raise ConfigError(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = of_sweep
    return to_config(composed)


def to_config(composed: DictConfig) -> TrainConfig:
    """Convert a DictConfig to validated dataclasses."""
    try:
        # The config is converted to plain values, because the result of an interpolation would keep its own type, and
        # merged again, because to_object silently drops unknown keys.
        values = cast(dict, OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
        _check_dicts(values)
        merged = OmegaConf.merge(schema(), values)
        config = cast(TrainConfig, OmegaConf.to_object(merged))
    except UNREADABLE as error:
        raise ConfigError(_with_interpolations(explain(error), composed)) from error
    config.data.resident = config.data.resident.lower()  # YAML's true becomes the string 'True' in a string field
    config.data.root = os.path.expanduser(config.data.root)  # the shell does not expand the ~ in data.root=~/images
    config.output_dir = os.path.expanduser(config.output_dir)
    if config.model.pretrained is not None:
        config.model.pretrained = os.path.expanduser(config.model.pretrained)
    validate(config)
    return config


def _with_interpolations(text: str, composed: DictConfig) -> str:
    """If an error message names no key (as for errors in lists), add the keys whose values contain interpolations."""
    raw = flatten(cast(dict, OmegaConf.to_container(composed, resolve=False)))
    holders = [key for key, value in raw.items() if "${" in str(value)]
    return text if not holders or any(key in text for key in raw) else f"{', '.join(holders)}: {text.splitlines()[0]}"


def _check_dicts(values: dict[str, Any]) -> None:
    """Raise ConfigError if a dict replaces another type or vice versa; OmegaConf's own error would not name the key."""
    for key in key_table():
        group, _, name = key.rpartition(".")
        value = values[group][name] if group else values[name]
        if isinstance(value, dict) != (key in FREE_KEYS):
            rule = "must be names with values, as in {rho:0.9}" if key in FREE_KEYS else "must not be a dict"
            raise ConfigError(f"{key}={shorten(value)} {rule}")


@cache
def schema() -> DictConfig:
    """Return the schema, which holds the type and default of every key; it may be cached because `merge` copies it."""
    return OmegaConf.structured(TrainConfig)


def as_overrides(config: TrainConfig) -> list[str]:
    """Return the shortest overrides such that `compose_config(as_overrides(config)) == config`."""
    defaults = flatten(compose_config([]))
    return [f"{key}={as_written(value)}" for key, value in flatten(config).items() if value != defaults[key]]


def explain(error: Exception) -> str:
    """Summarise an error of Hydra or OmegaConf in one or two lines that name the key and the most similar valid key."""
    chain: list[BaseException] = [error]
    # OmegaConf chains some errors in a cycle.
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and all(cause is not c for c in chain):
        chain.append(cause)
    for link in chain:
        full_key = getattr(link, "full_key", None) or ""
        key = full_key.partition("[")[0]  # "data.mean" for data.mean[1]
        if key:
            return unknown_key(key) or f"{shorten(full_key)}: {shorten(str(link).splitlines()[0])}"
    return shorten(error).replace("Could not override", "cannot override")
