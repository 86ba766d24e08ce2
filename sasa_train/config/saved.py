"""Read and write the configs saved in config.yaml and checkpoints, and apply overrides to them."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sasa_train.config.compose import explain, quote_texts, schema, to_config
from sasa_train.config.keys import DataConfig, TrainConfig, flatten, with_values
from sasa_train.config.overrides import (
    MAX_TEXT,
    UNREADABLE,
    check_override_keys,
    is_group,
    one_list_each,
    parse_overrides,
)
from sasa_train.config.rules import check_values
from sasa_train.files import read_regular
from sasa_train.refusal import ConfigError, shorten

MAX_DEPTH = 20  # levels of lists and keys in a YAML text
# What a config computed before these keys existed. A config that lacks them was saved then, and keeps this behaviour.
BEFORE: dict[str, Any] = {"data.exif": "ignore", "data.background": "none", "data.clip_values": True}
# Keys whose null means "from the source of model.pretrained", if the run has one. It keeps the values with which it
# began. In configs saved before this was so, null stands for the values of the data set, as it did then.
TAKEN = ("data.mean", "data.std", "data.interpolation", "data.val_crop")


def load_config(yaml_text: str, overrides: Sequence[str] = (), source: str = "the saved config") -> TrainConfig:
    """Parse a saved config and apply value overrides; group choices are refused because they require composition.

    Raises:
        ConfigError: the config is invalid (see `compose_config`); if its text is malformed, the message names `source`.
    """
    check_override_keys(overrides)
    overrides = one_list_each(overrides)
    saved = _read_saved(yaml_text, source)
    _update(saved, overrides, source)
    given = {o.key_or_group for o in parse_overrides(overrides)}
    _forget_the_other_batch_key(saved, given)
    _forget_the_other_data_set(saved, given)
    return to_config(saved)


def check_overrides(overrides: Sequence[str], source: str) -> None:
    """Raise ConfigError for overrides that `load_config` refuses whatever the saved config: keys, types and bounds."""
    check_override_keys(overrides)
    values = deepcopy(schema())
    _update(values, one_list_each(overrides), source)
    to_config(values, check_values)


def _update(saved: DictConfig, overrides: Sequence[str], source: str) -> None:
    try:
        for override in parse_overrides(overrides):
            if is_group(override):
                raise ConfigError(f"{override.input_line} chooses a config group, but {source} is complete; set values")
            # The value is replaced, not merged, because otherwise an optimizer argument could never be removed.
            OmegaConf.update(saved, override.key_or_group, override.value(), merge=False)
        given = {o.key_or_group for o in parse_overrides(overrides)}
        saved.derive = [key for key in saved.derive if key not in given]
    except UNREADABLE as error:
        raise ConfigError(explain(error)) from error


def load_config_file(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a file with `load_config`; also raise ConfigError if it cannot be read as text."""
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return load_config(text, overrides, source=str(path))


def as_begun(config: TrainConfig, yaml_text: str) -> TrainConfig:
    """Return `config` with what the run of a saved config took when it began, wherever `config` leaves this open.

    Applies to the keys of `BEFORE`, if the saved config lacks them and `config` has their defaults, to null values of
    the keys in `TAKEN`, if the run began with pretrained weights, and to the keys in `derive`.
    """
    saved, values, defaults = flatten(load_config(yaml_text)), flatten(config), flatten(TrainConfig())
    taken = TAKEN if saved["model.pretrained"] is not None else ()
    keys = [key for key in _lacking(OmegaConf.create(yaml_text)) if values[key] == defaults[key]]
    keys += [key for key in taken if values[key] is None] + config.derive
    return with_values(config, {key: saved[key] for key in keys})


def _lacking(saved: Any) -> list[str]:
    missing = object()
    return [key for key in BEFORE if OmegaConf.select(saved, key, default=missing) is missing]


def _read_saved(yaml_text: str, source: str) -> DictConfig:
    """Return the saved values merged over the defaults and, for keys that it lacks, over what held before them."""
    # The text may come from an untrusted source.
    if not isinstance(yaml_text, str) or len(yaml_text) > MAX_TEXT:
        raise ConfigError(f"{source}: is not a config: expected a text of at most {MAX_TEXT:,} characters")
    try:
        _check_plain_yaml(yaml_text, source)
        saved = OmegaConf.create(quote_texts(yaml_text))
        merged = cast(DictConfig, OmegaConf.merge(schema(), saved))
        for key in _lacking(saved):
            OmegaConf.update(merged, key, BEFORE[key])
        return merged
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {explain(error)}") from error
    except (*UNREADABLE, AttributeError, AssertionError, TypeError) as error:
        raise ConfigError(f"{source}: is not YAML of keys and values ({shorten(error)})") from error


def _check_plain_yaml(text: str, source: str) -> None:
    """Raise ConfigError for anchors, aliases, tags and interpolations, which sasa_train never writes."""
    for event in shallow_events(text, source):
        value = event.value if isinstance(event, yaml.ScalarEvent) else ""
        marks = getattr(event, "anchor", None) or getattr(event, "tag", None)
        if marks or "${" in value or value == "???":
            raise ConfigError(
                f"{source}: line {event.start_mark.line + 1}: YAML's anchors, aliases and tags, and interpolations "
                f"({shorten(marks or value)}) are not taken; write the values"
            )


def shallow_events(text: str, source: str) -> Iterator[yaml.Event]:
    """Yield the events of a YAML text; raise ConfigError where lists and keys are nested too deeply."""
    depth = 0  # PyYAML takes time in proportion to its square
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"{source}: line {event.start_mark.line + 1}: lists and keys are nested more than {MAX_DEPTH} deep, "
                "which no config is; bring back the file that was written"
            )
        yield event


def _forget_the_other_batch_key(saved: DictConfig, given: set[str]) -> None:
    """If only one of micro_batch_size and grad_accum_steps is given, drop the saved value of the other."""
    if "trainer.micro_batch_size" in given and "trainer.grad_accum_steps" not in given:
        saved.trainer.grad_accum_steps = 1
    elif "trainer.grad_accum_steps" in given and "trainer.micro_batch_size" not in given:
        saved.trainer.micro_batch_size = None


def _forget_the_other_data_set(saved: DictConfig, given: set[str]) -> None:
    """If another data set is given by its name, drop the saved keys that say which images those of another one are."""
    if "data.name" not in given:
        return
    of_sets = {"own": ("target", "args"), "torchvision": ("dataset", "args"), "hf": ("dataset", "args", "columns")}
    of_sets["list"] = ("train", "val", "columns")
    kept, defaults = of_sets.get(saved.data.name, ()), DataConfig()
    for key in {key for keys in of_sets.values() for key in keys if key not in kept and f"data.{key}" not in given}:
        saved.data[key] = getattr(defaults, key)
    if "data.root" not in given and (saved.data.root is None) != (saved.data.name == "list"):
        saved.data.root = None if saved.data.name == "list" else defaults.root


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))
