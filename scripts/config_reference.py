"""Generate docs/config.md from the dataclasses in sasa_train/config/keys.py and the files in configs/.

usage: python scripts/config_reference.py > docs/config.md
"""

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from sasa_train.config.bounds import written_default
from sasa_train.config.groups import GROUPS, choices, config_dir
from sasa_train.config.keys import FREE_KEYS, key_table
from sasa_train.config.overrides import as_written
from sasa_train.sweep.planning import SweepConfig

HEAD = """# Every key

*Made by `python scripts/config_reference.py > docs/config.md`; a test compares.* The same keys hold on the command line
(`sasa-train trainer.epochs=10`), in `configs/` and in a run's `config.yaml`; `sasa-train --help` prints them too. A
misspelt key, a wrong type and values that cannot go together are refused before anything is loaded, with exit code 2.

- The default holds where no file of a chosen group says otherwise. `null` means: as the meaning says.
- A key with a star may differ between a run and its continuation; all others shape what is computed, and are compared
  when a run resumes (`allow_config_change=[trainer.epochs]` lets one differ).
- Lists are written `[a,b]`, arguments of {free} `{{name:value}}`. Texts with
  other signs than a plain word's are quoted.
- A choice is a file in `configs/<group>/` that sets some of these keys: `model=sasa_resnet50`. Later words win:
  experiment files over groups, the command line over all.
"""
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}


def main() -> None:
    print(reference(), end="")


def reference() -> str:
    """The page, as Markdown."""
    parts = [HEAD.format(free=" and ".join(f"`{key}`" for key in FREE_KEYS))]
    for group in ("model", "data", "optimizer", "schedule", "augment", "trainer", ""):
        parts.append(f"## {group or 'Top level'}\n")
        parts.append(keys({key: field for key, field in key_table().items() if key.rpartition(".")[0] == group}))
        if group in GROUPS:
            parts.append(choice_table(group))
    parts.append("## experiment\n\nA whole recipe: the command is `sasa-train experiment=NAME`.\n")
    parts.append(choice_table("experiment"))
    parts.append(
        "## sweep\n\nThe keys of `sasa-sweep` and of the files in `configs/sweep/`, see [sweeps.md](sweeps.md).\n"
    )
    parts.append(keys(key_table(SweepConfig, "sweep.")))
    parts.append(choice_table("sweep"))
    return "\n".join(parts)


def keys(fields: dict[str, dataclasses.Field]) -> str:
    return table(("key", "type and bounds", "default", "meaning"), [row(key, field) for key, field in fields.items()])


def row(key: str, field: dataclasses.Field) -> tuple[str, ...]:
    bounds = field.metadata["bounds"]
    words = type_in_words(field.type) + (f", {bounds}" if bounds else "")
    star = "\\*" if field.metadata["may_change"] else ""
    meaning = field.metadata["help"].replace("*", "\\*").replace("|", "\\|")
    return f"`{key}`{star}", words, f"`{written_default(field)}`", meaning


def type_in_words(kind: typing.Any) -> str:
    """`list[float] | None` -> "list of numbers or null"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(type_in_words(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        part = type_in_words(typing.get_args(kind)[0])
        return "list of lists" if part.startswith("list") else f"list of {part}s"
    return "arguments" if typing.get_origin(kind) is dict else WORDS[kind]


def choice_table(group: str) -> str:
    found = {f"`{group}={name}`": describe(config_dir() / group / f"{name}.yaml") for name in choices(group)}
    by_name = [choice for choice, words in found.items() if not words]
    sentence = f"Choices that set the name alone: {', '.join(by_name)}.\n" if by_name else ""
    rows = [(choice, words) for choice, words in found.items() if words]
    return "\n".join(part for part in (sentence, table(("choice", "is"), rows) if rows else "") if part)


def describe(path: Path) -> str:
    """The first sentence of the file's comments; without comments, the values that it sets beside the name."""
    text = path.read_text(encoding="utf-8")
    comments = re.findall(r"^# ?(.*)$", text, re.MULTILINE)
    is_command = re.compile(r"@package|sasa-|  ")
    words = " ".join(line for line in comments if not is_command.match(line))
    if words:
        return re.split(r"(?<=[\w)%])\. (?=[A-Z])", words)[0].rstrip(".").replace("|", "\\|")
    values = {str(key): value for key, value in OmegaConf.load(path).items() if key != "name"}
    return ", ".join(f"`{key}={as_written(value)}`" for key, value in values.items())


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
