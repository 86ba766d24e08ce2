"""From the command line to one validated TrainConfig: Hydra composes, and what is misspelt is refused with its remedy.

Hydra composes inside our own functions, not in front of them, so that a refusal is a message and exit code 2.
"""

import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sasa_train.choices import GROUPS, choices, config_dir
from sasa_train.config import FREE_KEYS, MAX_DEPTH, ConfigError, TrainConfig, flatten, knob_table, shorten, validate
from sasa_train.printable import printable_lines

MAX_JOBS = 1000  # of a sweep: each one's config is composed before the first begins
MAX_TEXT = 2**16  # characters of a saved config or an override; ours have 4,000, and parsers take long over more
# What Hydra, OmegaConf and PyYAML raise over what they are given: an int of 5,000 digits, or 2,000 lists in one another
UNREADABLE = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError)
FREE = ("optimizer.args.", "schedule.args.")  # timm knows what is under these; optim.py checks it
WORDS = ("null", "true", "false", "nan", "inf")  # what Hydra reads as no text

ConfigStore.instance().store(name="schema", node=TrainConfig)


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Compose `configs/train.yaml` with Hydra overrides.

    Raises:
        ConfigError: an unknown key or group, a value of the wrong type, or values that cannot go together.
    """
    check_override_keys(overrides)
    of_sweep = GlobalHydra.instance().hydra  # in a job of -m, which goes on with it
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("train", overrides=with_free_keys(overrides))
    except UNREADABLE as error:
        raise ConfigError(_explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = of_sweep
    return to_config(composed)


def load_config(yaml_text: str, overrides: Sequence[str] = (), source: str = "the saved config") -> TrainConfig:
    """A saved config with value overrides on top; group choices need a composition and are refused here.

    Raises:
        ConfigError: as `compose_config`; the message names `source` where the text itself is at fault.
    """
    check_override_keys(overrides)
    saved = _read_saved(yaml_text, source)
    try:
        for override in parse_overrides(overrides):
            if _is_group(override):
                raise ConfigError(f"{override.input_line} chooses a config group, but {source} is complete; set values")
            # Replaced, not merged: else an argument of an optimizer could never be taken away.
            OmegaConf.update(saved, override.key_or_group, override.value(), merge=False)
        _forget_the_other_batch_key(saved, {o.key_or_group for o in parse_overrides(overrides)})
    except UNREADABLE as error:
        raise ConfigError(_explain(error)) from error
    return to_config(saved)


def load_config_file(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """`load_config` of a file.

    Raises:
        ConfigError: as `load_config`, or the file cannot be read as text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return load_config(text, overrides, source=str(path))


def _read_saved(yaml_text: str, source: str) -> DictConfig:
    """The saved values over the defaults. The text may be a stranger's."""
    if not isinstance(yaml_text, str) or len(yaml_text) > MAX_TEXT:
        raise ConfigError(f"{source}: is no config: a text of up to {MAX_TEXT:,} characters")
    try:
        _check_plain_yaml(yaml_text)
        content = OmegaConf.create(yaml_text)
        return cast(DictConfig, OmegaConf.merge(_schema(), content))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (*UNREADABLE, AttributeError, AssertionError, TypeError) as error:
        raise ConfigError(f"{source}: is no YAML of keys and values ({shorten(error)})") from error


def _check_plain_yaml(text: str) -> None:
    """Refuse what we never write and what does more than to hold a value: aliases, tags, interpolations."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"line {event.start_mark.line + 1}"
        if depth > MAX_DEPTH + 2:  # within a group of the config
            raise ConfigError(f"{where}: more than {MAX_DEPTH + 2} lists and groups in one another")
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{where}: YAML's anchors and aliases (&{event.anchor}) are not taken; write the values")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{where}: YAML's tags ({shorten(event.tag)}) are not taken; write plain values")
        if isinstance(event, yaml.ScalarEvent) and ("${" in event.value or event.value == "???"):
            raise ConfigError(f"{where}: interpolations ({shorten(event.value)}) are not taken; write the values")


def _forget_the_other_batch_key(saved: DictConfig, given: set[str]) -> None:
    """A saved config holds both micro_batch_size and the accumulation that follows; a new one of them decides."""
    if "trainer.micro_batch_size" in given and "trainer.grad_accum_steps" not in given:
        saved.trainer.grad_accum_steps = 1
    elif "trainer.grad_accum_steps" in given and "trainer.micro_batch_size" not in given:
        saved.trainer.micro_batch_size = None


def to_config(composed: DictConfig) -> TrainConfig:
    """DictConfig -> validated dataclasses. (Merged anew: to_object alone drops stray keys in silence.)"""
    try:
        # As plain values, or what an interpolation gives would keep its own type.
        values = cast(dict, OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
        _check_dicts(values)
        merged = OmegaConf.merge(_schema(), values)
        config = cast(TrainConfig, OmegaConf.to_object(merged))
    except UNREADABLE as error:
        raise ConfigError(_with_interpolations(_explain(error), composed)) from error
    config.data.resident = config.data.resident.lower()  # YAML's true becomes the word 'True' in a text field
    config.data.root = os.path.expanduser(config.data.root)  # no shell expands the ~ in data.root=~/images
    config.output_dir = os.path.expanduser(config.output_dir)
    if config.model.pretrained is not None:
        config.model.pretrained = os.path.expanduser(config.model.pretrained)
    validate(config)
    return config


def _with_interpolations(text: str, composed: DictConfig) -> str:
    """The error with the keys that hold interpolations, where it names none: OmegaConf forgets it in a list."""
    raw = flatten(cast(dict, OmegaConf.to_container(composed, resolve=False)))
    holders = [key for key, value in raw.items() if "${" in str(value)]
    return text if not holders or any(key in text for key in raw) else f"{', '.join(holders)}: {text.splitlines()[0]}"


def _check_dicts(values: dict[str, Any]) -> None:
    """Refuse a dict in place of anything else, which OmegaConf does without a word about where."""
    for key in knob_table():
        group, _, name = key.rpartition(".")
        value = values[group][name] if group else values[name]
        if isinstance(value, dict) != (key in FREE_KEYS):
            rule = "must be names with values, as in {rho:0.9}" if key in FREE_KEYS else "must not be a dict"
            raise ConfigError(f"{key}={shorten(value)} {rule}")


@cache
def _schema() -> DictConfig:
    """Every knob with type and default; `merge` copies it."""
    return OmegaConf.structured(TrainConfig)


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def as_overrides(config: TrainConfig) -> list[str]:
    """The shortest command line that composes this very config: `compose_config(as_overrides(config)) == config`."""
    defaults = flatten(compose_config([]))
    return [f"{key}={as_written(value)}" for key, value in flatten(config).items() if value != defaults[key]]


def as_written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{as_written(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(as_written(part) for part in value) + "]"
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_/.-]*", value) and value.lower() not in WORDS
        return value if is_word else QuotedString(value, Quote.single).with_quotes()
    return repr(value) if isinstance(value, float) else json.dumps(value)


def with_free_keys(overrides: Sequence[str]) -> list[str]:
    """Hydra takes keys that no dataclass names with ++ alone."""
    return [f"++{o}" if o.startswith(("optimizer.args", "schedule.args")) else o for o in overrides]


def chooses_group(overrides: Sequence[str]) -> bool:
    return any(_is_group(override) for override in parse_overrides(overrides))


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    return [_parse(override) for override in overrides]


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every job of a grid: `a=1,2 b=range(2)` -> (a=1, b=0), (a=1, b=1), (a=2, b=0), (a=2, b=1).

    Raises:
        ConfigError: a value that cannot be enumerated, or more than MAX_JOBS jobs.
    """
    values = [_sweep_values(override) for override in parse_overrides(overrides)]
    if math.prod(len(v) for v in values) > MAX_JOBS:
        raise ConfigError(f"{' '.join(overrides)}: a sweep of more than {MAX_JOBS:,} jobs; split it")
    return list(itertools.product(*values))


def _sweep_values(override: Override) -> list[str]:
    """`seed=0,1` -> seed=0 and seed=1; one more than MAX_JOBS at most."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
    except (HydraException, ArithmeticError, ValueError) as error:
        reason = "no range of numbers" if isinstance(error, ArithmeticError) else error
        raise ConfigError(f"{override.input_line}: cannot be swept over ({reason}); write key=a,b,c") from error
    return [f"{override.key_or_group}={value}" for value in values]


@lru_cache
def _parse(override: str) -> Override:
    try:
        if len(override) > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT:,} characters")
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{shorten(override)}: cannot be read ({shorten(error)}); an override is key=value, as in "
            "trainer.epochs=10, and a value with other signs than a plain word's is quoted: key='...'"
        ) from error


def check_override_keys(overrides: Sequence[str], is_sweep: bool = False) -> None:
    """Refuse keys that no knob has, with the nearest that one has; `+key`, `++key` and `~key` too.

    Hydra's own keys have a meaning in a sweep alone.
    """
    known = set(knob_table())
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if override.package is not None:
            raise ConfigError(f"{override.input_line}: keys have no @package here; write {key}=...")
        if override.is_sweep_override() and not is_sweep:
            raise ConfigError(
                f"{override.input_line}: several values are a sweep, which needs -m; a list is [a,b], a text is quoted"
            )
        if key.split(".")[0].split("/")[0] == "hydra":
            if not is_sweep:
                raise ConfigError(f"{override.input_line}: hydra's own keys have an effect with -m alone")
            continue
        if not key:
            raise ConfigError(f"{override.input_line}: has no key; an override is key=value, as in trainer.epochs=10")
        if key not in known and key not in GROUPS and not key.startswith(FREE):
            raise ConfigError(f"unknown key {shorten(key)!r}: {nearest(key, [*known, *GROUPS])}")
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"{override.input_line}: every key exists already; write {key}=... without + or ~")
        if _is_group(override):
            _check_choice(override)
        elif key in GROUPS:
            raise ConfigError(f"{override.input_line}: set its keys one by one, as in {key}.name=...")


def nearest(word: str, words: Sequence[str]) -> str:
    """'did you mean ...?', or where to look."""
    # A right name under the wrong group is nearer than any spelling.
    found = [w for w in words if w.rpartition(".")[2] == word.rpartition(".")[2]]
    found = found or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {' or '.join(found)}?" if found else "sasa-train --help lists every key"


def _check_choice(override: Override) -> None:
    group, choice = override.key_or_group, override.value()  # a sweep's choices are checked job by job
    if override.is_sweep_override():
        return
    for name in choice if isinstance(choice, list) else [choice]:
        if name not in choices(group):
            hint = nearest(str(name), choices(group))
            raise ConfigError(f"{group}={shorten(choice)} is none of {', '.join(choices(group))}: {hint}")


def _is_group(override: Override) -> bool:
    """`model=...`, `experiment=...`; for an object in place of a choice (`model={...}`) the answer is no."""
    return override.key_or_group in GROUPS and not isinstance(override.value(), dict)


def _explain(error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one or two lines: the key, and the nearest right one."""
    chain: list[BaseException] = [error]
    # OmegaConf raises some errors from one another in a ring.
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and all(cause is not c for c in chain):
        chain.append(cause)
    for link in chain:
        full_key = getattr(link, "full_key", None) or ""
        key = full_key.partition("[")[0]  # of data.mean[1]
        if key and key not in knob_table() and key not in GROUPS and not key.startswith(FREE):
            return f"unknown key {shorten(key)!r}: {nearest(key, list(knob_table()))}"
        if key:
            return f"{shorten(full_key)}: {shorten(str(link).splitlines()[0])}"
    return shorten(error).replace("Could not override", "cannot override")


def print_help(command: str, usage: str) -> None:
    """Usage, the groups with their choices, and every knob with default and meaning."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in peace
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)

    def entry(name: str, text: str, column: int) -> str:
        indent = " " * column
        return textwrap.fill(text, width, initial_indent=f"  {name:<{column - 3}} ", subsequent_indent=indent)

    print(f"usage: {command} {usage}\n")
    print("Config groups (group=choice; the files are in configs/; an experiment chooses in all groups at once):")
    for group in GROUPS:
        print(entry(group, ", ".join(choices(group)), column=14))
    print("\nKeys (key=value; with the defaults that hold where no group's file says otherwise; null: not set):")
    group = ""
    for key, knob in knob_table().items():
        if key.rpartition(".")[0] != group:
            group = key.rpartition(".")[0]
            print()
        factory = knob.default_factory
        default = factory() if factory is not dataclasses.MISSING else knob.default
        shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
        print(entry(f"{key}={shown}", knob.metadata["help"], column=42))
    print("\nExit codes: 0 done, 75 stopped and ready to continue (run the same command), 2 refused, 1 failed.")


def fail(error: Exception) -> int:
    """Print a refusal the way every command does, with what it quotes from a disk escaped; returns exit code 2."""
    path = Path(sys.argv[0])
    command = path.parent.name if path.stem == "__main__" else path.stem
    print(printable_lines(f"{command}: {error}"), file=sys.stderr)
    return 2
