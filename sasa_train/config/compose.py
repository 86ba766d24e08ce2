"""One validated TrainConfig from the command line: Hydra composes `configs/train.yaml` and the overrides.

Hydra composes inside our own functions, not in front of them, so that a refusal is a message and exit code 2.
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
    """Compose `configs/train.yaml` with Hydra overrides.

    Raises:
        ConfigError: an unknown key or group, a value of the wrong type, or values that cannot go together.
    """
    check_override_keys(overrides)
    of_sweep = GlobalHydra.instance().hydra  # in a job of -m, which needs it afterwards
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
    """Turn a DictConfig into validated dataclasses."""
    try:
        # Plain values, because an interpolation's result would keep its own type. Merged anew, because to_object alone
        # drops stray keys in silence.
        values = cast(dict, OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
        _check_dicts(values)
        merged = OmegaConf.merge(schema(), values)
        config = cast(TrainConfig, OmegaConf.to_object(merged))
    except UNREADABLE as error:
        raise ConfigError(_with_interpolations(explain(error), composed)) from error
    config.data.resident = config.data.resident.lower()  # YAML's true becomes the word 'True' in a text field
    config.data.root = os.path.expanduser(config.data.root)  # no shell expands the ~ in data.root=~/images
    config.output_dir = os.path.expanduser(config.output_dir)
    if config.model.pretrained is not None:
        config.model.pretrained = os.path.expanduser(config.model.pretrained)
    validate(config)
    return config


def _with_interpolations(text: str, composed: DictConfig) -> str:
    """Add to an error that names no key, as OmegaConf's in a list, the keys that hold interpolations."""
    raw = flatten(cast(dict, OmegaConf.to_container(composed, resolve=False)))
    holders = [key for key, value in raw.items() if "${" in str(value)]
    return text if not holders or any(key in text for key in raw) else f"{', '.join(holders)}: {text.splitlines()[0]}"


def _check_dicts(values: dict[str, Any]) -> None:
    """Refuse a dict in place of anything else, and name the key, which OmegaConf does not."""
    for key in key_table():
        group, _, name = key.rpartition(".")
        value = values[group][name] if group else values[name]
        if isinstance(value, dict) != (key in FREE_KEYS):
            rule = "must be names with values, as in {rho:0.9}" if key in FREE_KEYS else "must not be a dict"
            raise ConfigError(f"{key}={shorten(value)} {rule}")


@cache
def schema() -> DictConfig:
    """Return every key with type and default; `merge` copies it."""
    return OmegaConf.structured(TrainConfig)


def as_overrides(config: TrainConfig) -> list[str]:
    """Return the shortest command line for a config: `compose_config(as_overrides(config)) == config`."""
    defaults = flatten(compose_config([]))
    return [f"{key}={as_written(value)}" for key, value in flatten(config).items() if value != defaults[key]]


def explain(error: Exception) -> str:
    """Explain Hydra's and OmegaConf's errors in one or two lines: the key, and the nearest right one."""
    chain: list[BaseException] = [error]
    # OmegaConf raises some errors from one another in a ring.
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and all(cause is not c for c in chain):
        chain.append(cause)
    for link in chain:
        full_key = getattr(link, "full_key", None) or ""
        key = full_key.partition("[")[0]  # of data.mean[1]
        if key:
            return unknown_key(key) or f"{shorten(full_key)}: {shorten(str(link).splitlines()[0])}"
    return shorten(error).replace("Could not override", "cannot override")
