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

Look up a key, its default and its meaning. *Made by `python scripts/config_reference.py > docs/config.md`; a test
compares.* Keys are the same on the command line (`sasa-train trainer.epochs=10`), in `configs/` and in a run's
`config.yaml`; `sasa-train --help` prints them too. Misspelt keys, wrong types and values that cannot go together are
refused before anything is loaded, with exit code 2.

- A choice is a file in `configs/<group>/` that sets some of these keys: `model=sasa_resnet50`. Experiment files
  override groups, the command line overrides both; the defaults here hold where neither sets a key.
- A key with a star may change when a run resumes; all others may only with `allow_config_change=[trainer.epochs]`.
- Keys with the default null take null too. Lists are written `[a,b]`, arguments of {free}
  `{{name:value}}`. Quote texts with special signs.
- A path has at most 255 bytes per folder and 4,095 in all. A name has letters, digits and `_ . = , + -`.
"""
WORDS = {int: "integer", float: "number", str: "text", bool: "true/false", types.NoneType: "null"}


def main() -> None:
    print(reference(), end="")


def reference() -> str:
    """Return the page as Markdown."""
    parts = [HEAD.format(free=" and ".join(f"`{key}`" for key in FREE_KEYS))]
    for group in ("model", "data", "optimizer", "schedule", "augment", "trainer", ""):
        parts.append(f"## {group or 'Top level'}\n")
        parts.append(keys({key: field for key, field in key_table().items() if key.rpartition(".")[0] == group}))
        if group in GROUPS:
            parts.append(choice_list(group))
    parts.append("## experiment\n\nA whole recipe: the command is `sasa-train experiment=NAME`.\n")
    parts.append(choice_list("experiment"))
    parts.append(
        "## sweep\n\nThe keys of `sasa-sweep` and of the files in `configs/sweep/`, see [sweeps.md](sweeps.md).\n"
    )
    parts.append(keys(key_table(SweepConfig, "sweep.")))
    parts.append(choice_list("sweep"))
    return "\n".join(parts)


def keys(fields: dict[str, dataclasses.Field]) -> str:
    return table(("key=default", "meaning [type and bounds]"), [row(key, field) for key, field in fields.items()])


def row(key: str, field: dataclasses.Field) -> tuple[str, ...]:
    star = "\\*" if field.metadata["may_change"] else ""
    meaning = field.metadata["help"].replace("*", "\\*").replace("|", "\\|")
    return f"`{key}={written_default(field)}`{star}", f"{meaning} [{type_and_bounds(field)}]"


def type_and_bounds(field: dataclasses.Field) -> str:
    """Describe a key's type and bounds in words. The rules for paths and names are at the top of the page."""
    bounds = field.metadata["bounds"]
    kind = type_in_words(field.type)
    if field.default is None:
        kind = kind.removesuffix(" or null")
    if bounds is None:
        return kind
    if bounds.choices:
        return kind.replace("text", str(bounds))
    if bounds.is_path:
        return kind.replace("text", "path")
    if bounds.name_length:
        return kind.replace("text", f"name of at most {bounds.name_length} signs")
    return f"{kind}, {bounds}"


def type_in_words(kind: typing.Any) -> str:
    """Describe a type in words, e.g. `list[float] | None` as "list of numbers or null"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(type_in_words(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        part = type_in_words(typing.get_args(kind)[0])
        return "list of lists" if part.startswith("list") else f"list of {part}s"
    return "arguments" if typing.get_origin(kind) is dict else WORDS[kind]


def choice_list(group: str) -> str:
    """List the choices of a group, with a single line for choices that differ only in the model's depth."""
    words = {f"`{group}={name}`": describe(config_dir() / group / f"{name}.yaml") for name in choices(group)}
    alike: dict[str, list[str]] = {}
    for choice, description in words.items():
        alike.setdefault(re.sub(r"ResNet-\d+", "ResNet", description), []).append(choice)
    lines = []
    for shared, found in alike.items():
        description = words[found[0]] if len(found) == 1 else shared
        lines.append(f"- {', '.join(found)}: {description or 'nothing but the name'}\n")
    return "".join(lines)


def describe(path: Path) -> str:
    """Return the first sentence of the file's comments or, if it has none, the values that it sets besides the name."""
    text = path.read_text(encoding="utf-8")
    comments = re.findall(r"^# ?(.*)$", text, re.MULTILINE)
    is_command = re.compile(r"@package|sasa-|  ")
    words = " ".join(line for line in comments if not is_command.match(line))
    if words:
        return re.split(r"(?<=[\w)%])\. (?=[A-Z])", words)[0].rstrip(".").replace("|", "\\|")
    values = {str(key): value for key, value in OmegaConf.load(path).items() if key != "name"}
    return ", ".join(f"`{key}={as_written(value)}`" for key, value in values.items())


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    first, *others = (f"| {' | '.join(line)} |\n" for line in (head, *rows))
    return "".join((first, f"|{'---|' * len(head)}\n", *others))


if __name__ == "__main__":
    main()
