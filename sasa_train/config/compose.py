"""Compose `configs/train.yaml` and command-line overrides into a validated TrainConfig, using Hydra.

Hydra's compose API is called instead of its decorator, so that an invalid config results in a message and exit code 2.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from sasa_train.config.braces import read_weights
from sasa_train.config.groups import config_dir, file_named, own_dirs
from sasa_train.config.keys import CLASS_WEIGHTS, FREE_KEYS, TrainConfig, flatten, key_table, with_values
from sasa_train.config.overrides import (
    TEXT_KEYS,
    UNREADABLE,
    as_written,
    check_override_keys,
    for_hydra,
    is_group,
    parse_overrides,
    unknown_key,
)
from sasa_train.config.own_keys import use_code, use_code_of, use_presets
from sasa_train.config.rules import check_values, validate
from sasa_train.refusal import ConfigError, causes, shorten

# OmegaConf's message for a value of the wrong type, and its types in plain words.
KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
NOT_CONVERTED = r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (Integer|Float|bool)\b.*"

ConfigStore.instance().store(name="schema", node=TrainConfig)


def compose_config(overrides: Sequence[str], may_import: bool = True) -> TrainConfig:
    """Compose `configs/train.yaml` with Hydra overrides and validate the result.

    may_import: import the user's code that the overrides and presets name; False for overrides from a file.

    Raises:
        ConfigError: a key or group is unknown, a value has the wrong type, or values are incompatible.
    """
    use_presets(overrides)
    check_override_keys(overrides)
    if may_import:
        use_code(overrides)
    of_sweep = GlobalHydra.instance().hydra  # a job of -m needs it again afterwards
    GlobalHydra.instance().clear()
    try:
        with initialize_hydra():
            composed = compose("train", overrides=for_hydra(overrides))
    except UNREADABLE as error:
        raise ConfigError(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = of_sweep
    return as_asked(composed, overrides, may_import)


@contextmanager
def initialize_hydra() -> Iterator[None]:
    """Context manager in which Hydra composes the files in `configs/`, with text as it is written there."""
    with initialize_config_dir(str(config_dir()), job_name="sasa-train", version_base="1.3"):
        sources = GlobalHydra.instance().config_loader().get_sources()
        ours = next(number for number, source in enumerate(sources) if source.provider == "main")
        own = [TextSource("own", str(folder)) for folder in own_dirs()]
        sources[ours : ours + 1] = [TextSource("main", str(config_dir())), *own, FileSource("file", "/")]
        yield


class TextSource(FileConfigSource):
    """A folder of config files in which the values of text keys stay as they are written."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = self.file(config_path)
        result = super().load_config(str(path))
        text = path.read_text(encoding="utf-8")
        result.config = OmegaConf.create(quote_texts(text, group=config_path.rpartition("/")[0]))
        return result

    def file(self, config_path: str) -> Path:
        return Path(self.path, f"{config_path.removesuffix('.yaml')}.yaml")


class FileSource(TextSource):
    """The files that are chosen by their paths, as in experiment=./mine.yaml, in whichever group they are chosen."""

    def file(self, config_path: str) -> Path:
        path = _file_chosen(config_path)
        assert path is not None  # or `is_config` was false
        return path

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        return _file_chosen(config_path) is not None

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


def _file_chosen(config_path: str) -> Path | None:
    return file_named(config_path.removesuffix(".yaml").rpartition("/")[2])


def quote_texts(yaml_text: str, text_keys: AbstractSet[str] = TEXT_KEYS, group: str = "") -> str:
    """Quote the values of `text_keys`, so that YAML reads 2024_01_15 or `no` as a string; null stays null.

    The names of classes in `trainer.class_weights` are quoted likewise, as in {0: 2.0}.

    group: the group whose keys the text holds, without their prefix.
    """
    ends: dict[int, str] = {}

    def visit(node: yaml.Node, key: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                visit(value, f"{key}.{name.value}".replace(".<<", "").removeprefix("."))
                if CLASS_WEIGHTS in (key, f"{group}.{key}") and isinstance(name, yaml.ScalarNode):
                    quote(name)
        elif isinstance(node, yaml.SequenceNode):
            for part in node.value:
                visit(part, key)
        elif isinstance(node, yaml.ScalarNode) and node.style is None and not node.tag.endswith(":null"):
            is_text = key in text_keys or f"{group}.{key}" in text_keys or key.split(".")[0] == "defaults"
            if is_text:
                quote(node)

    def quote(node: yaml.ScalarNode) -> None:
        if node.style is None and re.fullmatch(r"[\w.:=+-]+", node.value):  # all numbers and words such as `no`
            ends[node.end_mark.index] = node.value

    visit(yaml.compose(yaml_text, Loader=yaml.SafeLoader), "")
    parts, start = [], 0
    for end, value in sorted(ends.items()):
        parts += [yaml_text[start : end - len(value)], f"'{value}'"]
        start = end
    return "".join(parts) + yaml_text[start:]


def to_config(composed: DictConfig, check: Callable[[TrainConfig], None] = validate) -> TrainConfig:
    """Convert a DictConfig to dataclasses that `check` accepts."""
    try:
        # The config is converted to plain values, because the result of an interpolation would keep its own type, and
        # merged again, because to_object silently drops unknown keys.
        values = cast(dict, OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
        values["trainer"]["class_weights"] = read_weights(values["trainer"]["class_weights"])
        _check_dicts(values)
        merged = OmegaConf.merge(schema(), values)
        config = cast(TrainConfig, OmegaConf.to_object(merged))
    except UNREADABLE as error:
        raise ConfigError(_with_interpolations(explain(error), composed)) from error
    meaning = "two for height and width, as in [160,224]"
    config.data.image_size = whole_numbers("data.image_size", config.data.image_size, 2, meaning)
    config.data.val_image_size = whole_numbers("data.val_image_size", config.data.val_image_size, 2, meaning)
    meaning = "four, one per stage, as in [7,7,5,3]"
    config.model.kernel_size = whole_numbers("model.kernel_size", config.model.kernel_size, 4, meaning)
    if type(config.model.scale) is int:
        config.model.scale = float(config.model.scale)
    config.data.sampler = config.data.sampler or "shuffled"
    config.data.resident = config.data.resident.lower()  # True and FALSE are taken, as for keys of true and false
    # The shell does not expand the ~ in data.root=~/images.
    for group, name in ((config.data, "root"), (config.data, "train"), (config.data, "val"), (config.data, "dataset"),
                        (config, "output_dir"), (config.model, "pretrained"), (config.distill, "teacher")):  # fmt: skip
        if (path := getattr(group, name)) is not None:
            setattr(group, name, os.path.expanduser(path))
    check(config)
    return config


def whole_numbers(key: str, value: Any, count: int, meaning: str) -> int | list[int] | None:
    """Check the type of a key that is a number or a list of `count`; equal numbers become one, so that run names agree.

    Raises:
        ConfigError: the value is neither a whole number nor a list of `count` of them.
    """
    if value is None:
        return None
    found = value if isinstance(value, list) else [value]
    found = [int(n) if isinstance(n, str) and re.fullmatch(r"[+-]?\d{1,18}", n) else n for n in found]
    if len(found) != (count if isinstance(value, list) else 1) or any(type(n) is not int for n in found):
        raise ConfigError(f"{key}={shorten(as_written(value))} must be a whole number, or {meaning}")
    return found[0] if len(set(found)) == 1 else found


def as_asked(composed: DictConfig, overrides: Sequence[str], may_import: bool = True) -> TrainConfig:
    """Convert a config that has just been composed; the keys in `derive` have no value yet, unless they are set."""
    config = _leave_open(to_config(composed, check_values), overrides)
    if may_import:
        use_code_of(config)
    if set(config.derive) <= {"data.holdout_fraction"}:  # no rule depends on the size of a hold-out
        validate(config)
    return config


def _leave_open(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """Remove from `derive` what the command line sets or chooses a group for; give the rest their defaults."""
    given = parse_overrides(overrides)
    keys = {override.key_or_group for override in given}
    groups = tuple(f"{o.key_or_group}." for o in given if is_group(o) and o.key_or_group != "data")
    groups += ("data.holdout_fraction",) if config.data.val is not None else ()
    still_open = [key for key in config.derive if key not in keys and not key.startswith(groups)]
    defaults = flatten(TrainConfig())
    return with_values(config, {"derive": still_open} | {key: defaults[key] for key in still_open})


def _with_interpolations(text: str, composed: DictConfig) -> str:
    """If an error message names no key (as for errors in lists), add the keys whose values contain interpolations."""
    raw = flatten(cast(dict, OmegaConf.to_container(composed, resolve=False)))
    holders = [key for key, value in raw.items() if "${" in str(value)]
    return text if not holders or any(key in text for key in raw) else f"{', '.join(holders)}: {text.splitlines()[0]}"


def _check_dicts(values: dict[str, Any]) -> None:
    """Raise ConfigError if a dict replaces another type or vice versa; OmegaConf's own error would not name the key."""
    for key in key_table().keys() - {CLASS_WEIGHTS}:
        group, _, name = key.rpartition(".")
        value = values[group][name] if group else values[name]
        if isinstance(value, dict) != (key in FREE_KEYS):
            rule = "must be names with values, as in {rho:0.9}" if key in FREE_KEYS else "must not be a dict"
            raise ConfigError(f"{key}={shorten(value)} {rule}")


@cache
def schema() -> DictConfig:
    """Return the schema, which holds the type and default of every key; it may be cached because `merge` copies it."""
    return OmegaConf.structured(TrainConfig)


def as_overrides(config: TrainConfig, named: AbstractSet[str] = frozenset()) -> list[str]:
    """Return the shortest overrides such that `compose_config(as_overrides(config)) == config`.

    named: keys that are among them even with their defaults.
    """
    defaults, values = _default_values(), flatten(config)
    # Without a name, a data.root stands for a set of one's own (`for_own_images`).
    is_named = values["data.root"] != defaults["data.root"]
    named = named | ({"data.name"} if is_named else set())
    keys = [key for key in values if values[key] != defaults[key] or key in named]
    return [f"{key}={as_written(values[key])}" for key in keys]


@cache
def _default_values() -> dict[str, Any]:
    return flatten(compose_config([]))


def explain(error: Exception) -> str:
    """Summarise an error of Hydra or OmegaConf in one or two lines that name the key and the most similar valid key."""
    if isinstance(error, RecursionError):
        return "lists or dicts are nested too deeply"
    for link in causes(error):
        full_key = getattr(link, "full_key", None) or ""
        key = full_key.partition("[")[0]  # "data.mean" for data.mean[1]
        if key and (wrong_kind := re.fullmatch(NOT_CONVERTED, str(link).splitlines()[0])):
            return f"{shorten(full_key)}={shorten(wrong_kind[1])} must be {KINDS[wrong_kind[2]]}"
        if key.startswith("experiment"):
            return "a file in experiment/ sets keys of all groups, so it must begin with the line: # @package _global_"
        if key and "is not a ListConfig" in str(link):
            return f"{shorten(full_key)}: must be a list, in brackets even if it has one value, as in [0.5]"
        if key:
            return unknown_key(key) or f"{shorten(full_key)}: {shorten(str(link).splitlines()[0])}"
    return shorten(error).replace("Could not override", "cannot override")
