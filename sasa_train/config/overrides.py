"""Command-line overrides: parsing, sweep expansion, and rejection of unknown keys with a suggestion."""

import difflib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf.errors import OmegaConfBaseException

from sasa_train.config.braces import quote_braces, written_name
from sasa_train.config.groups import GROUPS, choices, is_file, name_of_file
from sasa_train.config.keys import CLASS_WEIGHTS, FREE_KEYS, LISTS, MODEL_KEYS, OWN_MODELS, key_table, text_keys
from sasa_train.refusal import ConfigError, require, shorten

MAX_JOBS = 1000  # in a sweep, because every job's config is composed before the first job starts
MAX_TEXT = 2**16  # characters in a saved config (normally 4,000) or override; parsing a longer one is slow
# Hydra, OmegaConf and PyYAML raise these, for example for an int of 5,000 digits or 2,000 nested lists.
UNREADABLE = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError)
WORDS = ("null", "true", "false", "nan", "inf")  # Hydra does not parse these as strings
# What other programs call a key.
OTHER_NAMES = {
    "batch_size": "trainer.global_batch_size", "batch": "trainer.global_batch_size", "bs": "trainer.global_batch_size",
    "learning_rate": "optimizer.lr", "wd": "optimizer.weight_decay", "opt": "optimizer.name", "sched": "schedule.name",
    "img_size": "data.image_size", "imgsz": "data.image_size", "input_size": "data.image_size", 
    "size": "data.image_size",
    "workers": "data.num_workers", "data_dir": "data.root", "data_path": "data.root", "dataset": "data.root",
    "num_epochs": "trainer.epochs", "max_epochs": "trainer.epochs", "steps": "trainer.max_steps",
    "max_flops": "trainer.max_pflops",
    "amp": "trainer.precision", "fp16": "trainer.precision", "bf16": "trainer.precision", "ema": "trainer.ema_decay",
    "clip_grad": "trainer.grad_clip_norm", "smoothing": "trainer.label_smoothing", "arch": "model.name",
    "drop_path": "model.drop_path_rate", "aa": "augment.policy", "output": "output_dir", "name": "run_name",
}  # fmt: skip
HINTS = {  # further advice for a choice that a group does not have
    "model": " (a model of timm: model=timm model.name={0})",
    "data": " (your own images: data.root={0})",
}
TEXT_KEYS = frozenset({*text_keys(key_table()), *GROUPS, CLASS_WEIGHTS})
PATH_KEYS = {name for name, f in key_table().items() if (bounds := f.metadata["bounds"]) and bounds.is_path}


def as_written(value: Any) -> str:
    """Format a value in Hydra's override grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{written_name(name)}:{as_written(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(as_written(part) for part in value) + "]"
    if isinstance(value, str):
        is_word = re.fullmatch(r"(\.{1,2}/)*[A-Za-z_/][A-Za-z0-9_/.-]*", value) and value.lower() not in WORDS
        return value if is_word else QuotedString(value, Quote.single).with_quotes()
    return repr(value) if isinstance(value, float) else json.dumps(value)


def for_hydra(overrides: Sequence[str]) -> list[str]:
    """Write overrides without sweeps so that Hydra reads them as `parse_overrides` does.

    Texts are quoted, and keys that are not dataclass fields get the prefix ++. If they choose a model that is not one
    of ours, what a preset sets for ours has no effect.
    """
    given = {o.key_or_group: o.value() for o in parse_overrides(overrides)}
    is_other = "model.target" in given or given.get("model.name", OWN_MODELS[0]) not in OWN_MODELS
    written = [f"model.{name}=null" for name in MODEL_KEYS if is_other and f"model.{name}" not in given]
    for o in parse_overrides(one_list_each(overrides)):
        if is_group(o) and is_file(choice := str(o.value())):
            written.append(f"{o.key_or_group}={as_written(name_of_file(choice))}")
        elif o.key_or_group in TEXT_KEYS:
            written.append(f"{o.key_or_group}={as_written(o.value())}")
        else:
            written.append(f"{'++' if o.key_or_group.startswith(FREE_KEYS) else ''}{o.input_line}")
    return written


def one_list_each(overrides: Sequence[str]) -> list[str]:
    """Write a key in LISTS that is given several times, or as a single value, as one list: configs=[a,b]."""
    keys = [override.key_or_group for override in parse_overrides(overrides)]
    lists = {key: list(values_of(overrides, (key,))) for key in keys if key in LISTS}
    rest = [o for o, key in zip(overrides, keys, strict=True) if key not in LISTS]
    return [*(f"{key}={as_written(values)}" for key, values in lists.items()), *rest]


def values_of(overrides: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    """Yield the values, and the elements of lists, that a command line gives to keys; not those of sweeps."""
    for override in parse_overrides(overrides):
        if override.key_or_group not in keys:
            continue
        if not override.is_sweep_override():
            value = override.value()
            yield from map(str, value if isinstance(value, list) else [] if value is None else [value])
        elif override.key_or_group in LISTS:
            key = override.key_or_group
            raise ConfigError(f"{override.input_line}: several values of {key} are written as a list, {key}=[a,b]")


def for_own_images(overrides: Sequence[str]) -> list[str]:
    """Add the experiment for one's own images, or for fine-tuning, if a command line names only where they are.

    Add data=own if it names a function that returns them, and data=list if it names a list of them.
    """
    given = parse_overrides(overrides)
    keys = {override.key_or_group for override in given if override.input_line not in ("resume=auto", "resume=never")}
    if "data.target" in keys and not keys & {"data", "data.name", "resume"}:
        return ["data=own", *overrides]
    if not keys & {"data.root", "data.train"} or keys & {"data", "data.name", "experiment", "resume"}:
        return list(overrides)
    own = ["data=list"] if "data.train" in keys else []
    return [f"experiment={'finetune' if 'model.pretrained' in keys else 'my_images'}", *own, *overrides]


def chooses_group(overrides: Sequence[str]) -> bool:
    return any(is_group(override) for override in parse_overrides(overrides))


def parse_overrides(overrides: Sequence[str], text_keys: frozenset[str] = TEXT_KEYS) -> list[Override]:
    """Parse overrides with Hydra's grammar, except that the values of `text_keys` keep the typed characters.

    Raises:
        ConfigError: an override is not key=value.
    """
    for option, value in itertools.pairwise([*overrides, ""]):
        if option.startswith("-"):
            raise ConfigError(_instead_of(option, value))
        if value and "=" in (option, value[0], option[-1:] if "=" not in value else ""):
            raise ConfigError(f"{shorten(option)} {shorten(value)}: write key=value, with no spaces around =")
        if "=" not in option and os.path.isdir(option):
            raise ConfigError(f"{shorten(option)}: {_about_folder(option)}")
    return [_parse(override, text_keys) for override in overrides]


def _about_folder(path: str) -> str:
    """Say with which key a folder is given, ready for a shell."""
    is_run = os.path.isfile(os.path.join(path, "config.yaml"))
    what, key = ("continue this run", "resume") if is_run else ("train on the images in a folder", "data.root")
    return f"to {what}, write {pasted(key, path)}"


def pasted(key: str, path: str) -> str:
    """Write a key with a path as a word to paste into a shell."""
    value = path if re.fullmatch(r"[\w./ -]+", path) else as_written(path)
    return shlex.quote(f"{key}={value}")


def _instead_of(option: str, following: str) -> str:
    """Say how to write an option such as --epochs, with a value after = or in the following argument."""
    name, has_value, value = option.lstrip("-").replace("-", "_").partition("=")
    value = value if has_value or "=" in following else following
    found = _similar(name, [*key_table(), *GROUPS])
    example = f"{found[0]}={value or '...'}" if found else "trainer.epochs=10"
    return f"{shorten(option)}: is not an option here; values are given as key=value, as in {example}"


class TextVisitor(HydraOverrideVisitor):
    """Hydra's own reading of an override, except that numbers, true and false are texts with the typed characters."""

    def visitPrimitive(self, ctx: OverrideParser.PrimitiveContext) -> Any:
        value = super().visitPrimitive(ctx)
        return QuotedString(ctx.getText().strip(), Quote.single) if isinstance(value, int | float) else value

    def visitFunction(self, ctx: OverrideParser.FunctionContext) -> Any:
        # The numbers in range(1,3) or int(3.7) are the function's own.
        of_texts = ctx.getChild(0).getText() in ("choice", "shuffle", "sort", "str", "tag")
        return super().visitFunction(ctx) if of_texts else HydraOverrideVisitor(self.functions).visitFunction(ctx)


def _parse_texts(override: str) -> Override:
    tokens = CommonTokenStream(OverrideLexer(InputStream(override)))
    parsed = TextVisitor(create_functions()).visit(OverrideParser(tokens).override())
    parsed.input_line = override
    return parsed


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """List the jobs of a grid; `a=1,2 b=range(2)` gives (a=1, b=0), (a=1, b=1), (a=2, b=0) and (a=2, b=1).

    Raises:
        ConfigError: a value cannot be enumerated, or there are more than MAX_JOBS jobs.
    """
    values = [_sweep_values(override) for override in parse_overrides(overrides)]
    if math.prod(len(v) for v in values) > MAX_JOBS:
        raise ConfigError(f"{' '.join(overrides)}: a sweep of more than {MAX_JOBS:,} jobs; split it")
    return list(itertools.product(*values))


def _sweep_values(override: Override) -> list[str]:
    """Split an override such as `seed=0,1` into seed=0 and seed=1; return at most MAX_JOBS + 1 of them."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
    except (HydraException, ArithmeticError, ValueError) as error:
        reason = "not a range of numbers" if isinstance(error, ArithmeticError) else error
        raise ConfigError(f"{override.input_line}: cannot be swept over ({reason}); write key=a,b,c") from error
    return [f"{override.key_or_group}={value}" for value in values]


@lru_cache
def _parse(override: str, text_keys: frozenset[str]) -> Override:
    try:
        if len(override) > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT:,} characters")
        readable = quote_braces(override)
        try:
            parsed = OverridesParser.create().parse_override(readable)
        except HydraException:
            if (quoted := _quoted_path(override)) is None:
                raise
            readable = quoted
            parsed = OverridesParser.create().parse_override(readable)
        parsed = _parse_texts(readable) if parsed.key_or_group in text_keys else parsed
        parsed.input_line = override
        return parsed
    except (HydraException, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten(error)
        raise ConfigError(
            f"{shorten(override)}: cannot be read ({reason}); an override is key=value, as in "
            "trainer.epochs=10; put a value with special characters in two pairs of quotes: \"key='...'\""
        ) from error


def _quoted_path(override: str) -> str | None:
    """Quote the value of a key for paths, as /home/jürgen/a (b), which Hydra cannot read; None for anything else."""
    key, _, value = override.partition("=")
    # With a comma, it may be a sweep; ${ would be replaced.
    is_path = key in PATH_KEYS and value and value[0] not in "'\"[{" and not re.search(r",|\$\{", value)
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}" if is_path else None


def check_override_keys(overrides: Sequence[str], is_sweep: bool = False) -> None:
    """Raise ConfigError for unknown keys, `+key`, `++key`, `~key` and, outside sweeps, Hydra's own keys."""
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if override.package is not None:
            raise ConfigError(f"{override.input_line}: keys have no @package here; write {key}=...")
        if override.is_sweep_override() and not is_sweep:
            raise ConfigError(
                f"{override.input_line}: several values are a sweep: use sasa-sweep (or -m); write a list as [a,b], "
                "and a value that has a comma in quotes"
            )
        if key.split(".")[0].split("/")[0] == "hydra":
            if not is_sweep:
                raise ConfigError(f"{override.input_line}: hydra's own keys have an effect with -m alone")
            continue
        if not key:
            raise ConfigError(f"{override.input_line}: has no key; an override is key=value, as in trainer.epochs=10")
        if wrong := unknown_key(key):
            raise ConfigError(wrong)
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"{override.input_line}: every key exists already; write {key}=... without + or ~")
        if is_group(override):
            _check_choice(override)
        elif key in GROUPS:
            raise ConfigError(f"{override.input_line}: set its keys one by one, as in {key}.name=...")


def unknown_key(key: str) -> str:
    """Return "" if `key` is a key, a group or an argument in one of FREE_KEYS, otherwise an error message."""
    known = [*key_table(), *GROUPS]
    if key in known or key.startswith(tuple(f"{free}." for free in FREE_KEYS)):
        return ""
    return f"unknown key {shorten(key)!r}: {nearest(key, known)}"


def nearest(word: str, words: Sequence[str]) -> str:
    """Return 'did you mean ...?' with the most similar word or, if none is similar, a pointer to the help."""
    found = _similar(word, words)
    return f"did you mean {' or '.join(found)}?" if found else "sasa-train --help lists every key"


def _similar(word: str, words: Sequence[str]) -> list[str]:
    """Return the keys with the same name in another group, else the most similar word by meaning or spelling.

    Among keys that begin with the word, the most similar one is taken before all others.
    """
    name = word.rpartition(".")[2].replace("-", "_")
    same = [key for key in words if key.rpartition(".")[2] == name]
    meant = [OTHER_NAMES[name]] if OTHER_NAMES.get(name) in words else []
    longer = [key for key in words if len(name) > 2 and key.startswith(word)]
    return same or meant or difflib.get_close_matches(word, longer or words, n=1, cutoff=0 if longer else 0.6)


def _check_choice(override: Override) -> None:
    group, choice = override.key_or_group, override.value()  # a sweep's choices are checked job by job
    if override.is_sweep_override():
        return
    for name in choice if isinstance(choice, list) else [choice]:
        if is_file(str(name)):
            require(os.path.isfile(os.path.expanduser(str(name))), group, name, "is not a file")
            require(str(name).endswith(".yaml"), group, name, "must end in .yaml, the only ending that Hydra reads")
        elif name not in choices(group):
            hint = nearest(str(name), choices(group)) + HINTS.get(group, "").format(shorten(name))
            raise ConfigError(f"{group}={shorten(choice)} is none of {', '.join(choices(group))}: {hint}")


def is_group(override: Override) -> bool:
    """Whether an override selects a choice in a group (`experiment=...`) rather than setting a dict (`model={}`)."""
    return override.key_or_group in GROUPS and not isinstance(override.value(), dict)


WEIGHTS = ("ema", "raw")
OVERRIDE = re.compile(r"[+~]*[a-z_]+(\.[a-z0-9_]+)*=")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line arguments into file names and overrides, which set `weights` or a config key.

    An argument that names an existing file is always a file. Any other argument that looks like an override is treated
    as one, so that a misspelt key is rejected with a suggestion.
    """
    overrides = [text for text in arguments if OVERRIDE.match(text) and not os.path.lexists(text)]
    return [text for text in arguments if text not in overrides], overrides


def split_weights(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of the last `weights=`, or None, and the remaining overrides.

    Raises:
        ConfigError: the value is unknown, or `weights` is misspelt.
    """
    others = [text for text in overrides if not text.startswith("weights=")]
    for key in (text.partition("=")[0] for text in others):
        if key not in key_table() and difflib.get_close_matches(key, ["weights"]):
            raise ConfigError(f"unknown key {key!r}: did you mean weights?")
    wanted = [text.removeprefix("weights=") for text in overrides if text not in others]
    if wrong := [word for word in wanted if word not in WEIGHTS]:
        raise ConfigError(f"weights={shorten(wrong[0])} must be {' or '.join(WEIGHTS)}")
    return wanted[-1] if wanted else None, others
