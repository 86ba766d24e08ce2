"""From the command line to one validated TrainConfig: Hydra composes, and what is misspelt is refused with its remedy.

Hydra composes inside our own functions, not in front of them, so that a refusal is a message and exit code 2.
"""

import dataclasses
import difflib
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sasa_train.config import ConfigError, TrainConfig, knob_table, validate
from sasa_train.printable import printable_lines

FREE = ("optimizer.args.", "schedule.args.")  # timm knows what is under these; optim.py checks it
GROUPS = ("model", "data", "optimizer", "schedule", "augment", "experiment")

ConfigStore.instance().store(name="schema", node=TrainConfig)


def config_dir() -> Path:
    """`configs/`: inside the package where it was installed from a wheel, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Compose `configs/train.yaml` with Hydra overrides.

    Raises:
        ConfigError: an unknown key or group, a value of the wrong type, or values that cannot go together.
    """
    check_override_keys(overrides)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("train", overrides=with_free_keys(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    return to_config(composed)


def load_config(yaml_text: str, overrides: Sequence[str] = (), source: str = "the saved config") -> TrainConfig:
    """A saved config with value overrides on top; group choices need a composition and are refused here.

    Raises:
        ConfigError: as `compose_config`; the message names `source` where the text itself is at fault.
    """
    check_override_keys(overrides)
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.create(yaml_text))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{source}: is no YAML that can be read ({error})") from error
    try:
        for override in parse_overrides(overrides):
            if _is_group(override):
                raise ConfigError(f"{override.input_line} chooses a config group, but {source} is complete; set values")
            # Replaced, not merged: else an argument of an optimizer could never be taken away.
            OmegaConf.update(saved, override.key_or_group, override.value(), merge=False)
        _forget_the_other_batch_key(cast(DictConfig, saved), {o.key_or_group for o in parse_overrides(overrides)})
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    return to_config(cast(DictConfig, saved))


def _forget_the_other_batch_key(saved: DictConfig, given: set[str]) -> None:
    """A saved config holds both micro_batch_size and the accumulation that follows; a new one of them decides."""
    if "trainer.micro_batch_size" in given and "trainer.grad_accum_steps" not in given:
        saved.trainer.grad_accum_steps = 1
    elif "trainer.grad_accum_steps" in given and "trainer.micro_batch_size" not in given:
        saved.trainer.micro_batch_size = None


def to_config(composed: DictConfig) -> TrainConfig:
    """DictConfig -> validated dataclasses. (Merged anew: to_object alone drops stray keys in silence.)"""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), composed)
        config = cast(TrainConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    config.data.resident = config.data.resident.lower()  # YAML's true becomes the word 'True' in a text field
    config.data.root = os.path.expanduser(config.data.root)  # no shell expands the ~ in data.root=~/images
    config.output_dir = os.path.expanduser(config.output_dir)
    validate(config)
    return config


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def with_free_keys(overrides: Sequence[str]) -> list[str]:
    """Hydra takes keys that no dataclass names with ++ alone."""
    return [f"++{o}" if o.startswith(("optimizer.args", "schedule.args")) else o for o in overrides]


def chooses_group(overrides: Sequence[str]) -> bool:
    return any(_is_group(override) for override in parse_overrides(overrides))


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{error}\nan override is key=value, as in trainer.epochs=10") from error


def check_override_keys(overrides: Sequence[str], is_sweep: bool = False) -> None:
    """Refuse keys that no knob has, with the nearest that one has; `+key`, `++key` and `~key` too.

    Hydra's own keys have a meaning in a sweep alone.
    """
    known = set(knob_table())
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra":
            if not is_sweep:
                raise ConfigError(f"{override.input_line}: hydra's own keys have an effect with -m alone")
            continue
        if _is_group(override):
            _check_choice(override)
        elif key in GROUPS:
            raise ConfigError(f"{override.input_line}: set its keys one by one, as in {key}.name=...")
        elif key not in known and not key.startswith(FREE):
            raise ConfigError(f"unknown key {key!r}: {nearest(key, [*known, *GROUPS])}")
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"{override.input_line}: every key exists already; write {key}=... without + or ~")


def nearest(word: str, words: Sequence[str]) -> str:
    """'did you mean ...?', or where to look."""
    # A right name under the wrong group is nearer than any spelling.
    found = [w for w in words if w.rpartition(".")[2] == word.rpartition(".")[2]]
    found = found or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {' or '.join(found)}?" if found else "sasa-train --help lists every key"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _check_choice(override: Override) -> None:
    group, choice = override.key_or_group, override.value()  # a sweep's choices are checked job by job
    if isinstance(choice, str) and choice not in choices(group):
        raise ConfigError(f"{group}={choice} is none of {', '.join(choices(group))}: {nearest(choice, choices(group))}")


def _is_group(override: Override) -> bool:
    """`model=...`, `experiment=...`; for an object in place of a choice (`model={...}`) the answer is no."""
    return override.key_or_group in GROUPS and not isinstance(override.value(), dict)


def _explain(error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one or two lines: the key, and the nearest right one."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        full_key = getattr(link, "full_key", None)
        if full_key and full_key not in knob_table() and full_key not in GROUPS:
            return f"unknown key {full_key!r}: {nearest(full_key, list(knob_table()))}"
        if full_key:
            return f"{full_key}: {str(link).splitlines()[0]}"
    return str(error).replace("Could not override", "cannot override")


def print_help(command: str, usage: str) -> None:
    """Usage, the groups with their choices, and every knob with default and meaning."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in peace
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)

    def entry(name: str, text: str, column: int) -> str:
        indent = " " * column
        return textwrap.fill(text, width, initial_indent=f"  {name:<{column - 3}} ", subsequent_indent=indent)

    print(f"usage: {command} {usage}\n\nConfig groups (group=choice; the files are in configs/):")
    for group in GROUPS:
        print(entry(group, ", ".join(choices(group)), column=14))
    print("\nKeys (key=value; with the defaults that hold where no group's file says otherwise):")
    for key, knob in knob_table().items():
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


def as_overrides(config):
    return []
