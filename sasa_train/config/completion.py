"""What TAB offers after `sasa-...` in bash, zsh and fish: commands, options, config groups, keys, values, files.

`python -m sasa_train completion bash` prints the script that a shell loads; it asks `complete` at each TAB. That starts
Python anew, so nothing heavy is imported here.
"""

import argparse
import contextlib
import importlib
import os
import re
import shlex
import sys
import typing
from collections.abc import Sequence

from sasa_train.commands import COMMANDS
from sasa_train.config.groups import GROUPS, choices
from sasa_train.config.keys import CHOICES, OWN_MODELS, key_table

# -P: a file in the current folder that is called like one of Python's own modules must not run because of a TAB.
SCRIPTS = {
    "bash": """\
_sasa_train() {
    mapfile -t COMPREPLY < <({python} -P -m sasa_train complete bash "$COMP_WORDBREAKS" \\
        "${COMP_LINE:0:COMP_POINT}" 2> /dev/null)
}
complete -o nospace -F _sasa_train {commands}
""",
    "zsh": """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_sasa_train() {
    local -a found go_on complete
    found=("${(@f)$({python} -P -m sasa_train complete zsh "${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}" 2> /dev/null)}")
    go_on=(${${(M)found:#+*}#+})
    complete=(${${(M)found:#-*}#-})
    _describe -V sasa_train go_on -S '' -- complete
}
compdef _sasa_train {commands}
""",
    "fish": """\
function _sasa_train
    set -l current (commandline -ct | string unescape)
    {python} -P -m sasa_train complete fish (commandline -opc) "$current" 2> /dev/null
end
for command in {commands}
    complete -c $command -f -a '(_sasa_train)'
end
""",
}
PATH_KEYS = ("data.root", "output_dir", "resume", "model.pretrained", "sweep.output_dir")
WORDS = {**CHOICES, "model.name": OWN_MODELS, "resume": ("auto", "never"), "weights": ("ema", "raw")}

GO_ON = ("=", ".", "/")  # no space after these

Found = dict[str, str]  # what may stand there, with its meaning


def script(shell: str) -> str:
    """What makes `shell` complete our commands, by the Python that prints this."""
    commands = " ".join(f"sasa-{name}" for name in COMMANDS)
    return SCRIPTS[shell].replace("{python}", shlex.quote(sys.executable)).replace("{commands}", commands)


def answer(shell: str, words: Sequence[str]) -> str:
    """A line for each candidate, as `script` reads it.

    words: up to the cursor, the command first; of bash instead what it splits words at, `=` among it, and the line.
    """
    if shell != "bash":
        found = complete(words)
        if shell == "fish":
            return "\n".join(f"{word}\t{meaning}" for word, meaning in found.items())
        return "\n".join(_for_zsh(word, meaning) for word, meaning in found.items())
    breaks, line = words
    words, quote = split_line(line)
    found = complete(words)
    # bash replaces what follows the last break, and nothing breaks a quoted word.
    start = 0 if quote else max((words[-1].rfind(sign) + 1 for sign in breaks if sign in "=:"), default=0)
    return "\n".join(word[start:] if quote else _for_bash(word[start:]) for word in found)


def split_line(line: str) -> tuple[list[str], str]:
    """A command line's words, the last one perhaps empty or not yet ended; and the quote that is open."""
    for quote in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            *words, last = shlex.split(f"{line}.{quote}")  # the dot shows whether the last word has ended
            return [*words, last[:-1]], quote
    raise ValueError(f"{line} is no command line")


def _for_bash(word: str) -> str:
    """As it is typed: what means something to a shell escaped, and a space where the word is complete."""
    return re.sub(r"([^\w@%+=:,./~-])", r"\\\1", word) + ("" if word.endswith(GO_ON) else " ")


def _for_zsh(word: str, meaning: str) -> str:
    """As `_describe` takes it, after a sign that says whether the word goes on."""
    escaped = re.sub(r"([\\:])", r"\\\1", word)
    return ("+" if word.endswith(GO_ON) else "-") + (f"{escaped}:{meaning}" if meaning else escaped)


def complete(words: Sequence[str]) -> Found:
    """Candidates for the last of `words`, of which the first is the command; what ends in `=`, `.` or `/` goes on."""
    name, current = os.path.basename(words[0]).removeprefix("sasa-"), words[-1]
    command = COMMANDS[name]
    before = words[1:-1]
    found: Found = {}
    if command.options:
        found = dict.fromkeys(command.options, "")
    elif (parser := _parser(command.module)) is not None:
        found, is_value = of_parser(parser, before, current)
        if is_value:
            return _beginning(found, current)
    if not current.startswith("-"):
        found = {word: meaning for word, meaning in found.items() if not word.startswith("-")}
        if command.reads == "configs" or (command.reads == "runs" and before):  # the run stands first
            is_sweep = name == "sweep" or not {"-m", "--multirun"}.isdisjoint(before)
            found |= of_overrides(current, _groups(name), _knobs(name), is_sweep)
        if command.reads in ("files", "runs"):
            found |= paths(current)
    return _beginning(found, current)


def _beginning(found: Found, current: str) -> Found:
    return {word: meaning for word, meaning in found.items() if word.startswith(current)}


def _parser(module: str) -> argparse.ArgumentParser | None:
    """A command's own parser, of which its options are taken, where it has one."""
    build = getattr(importlib.import_module(module), "build_parser", None)
    return build() if build else None


def of_parser(parser: argparse.ArgumentParser, words: Sequence[str], current: str) -> tuple[Found, bool]:
    """Options, subcommands and choices; True with them where nothing else may stand, as for an option's value."""
    for word in words:
        parser = _subcommands(parser).get(word, parser)
    options = {text: action for action in parser._actions for text in action.option_strings}
    option, equals, value = current.partition("=")
    if equals and option in options:
        return {f"{option}={word}": "" for word in _values(options[option], value)}, True
    last = max((i for i, word in enumerate(words) if word in options), default=None)
    more: Found = {}
    if last is not None:
        action, num_given = options[words[last]], len(words) - last - 1
        if num_given < (action.nargs if isinstance(action.nargs, int) else 1):
            return _values(action, current), True
        more = _values(action, current) if action.nargs in ("+", "*") else {}
    found = {text: _meaning(parser, action) for text, action in options.items() if text.startswith("--")}
    found |= {str(word): "" for action in parser._get_positional_actions() for word in action.choices or ()}
    return found | more, bool(_subcommands(parser))


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _values(action: argparse.Action, value: str) -> Found:
    return {str(choice): "" for choice in action.choices} if action.choices else paths(value)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _groups(name: str) -> tuple[str, ...]:
    return {"sweep": (*GROUPS, "sweep")}.get(name, GROUPS) if COMMANDS[name].reads == "configs" else ()


def _knobs(name: str) -> dict[str, str]:
    """Keys with their meanings."""
    knobs = {key: knob.metadata["help"] for key, knob in key_table().items()}
    if name == "sweep":
        from dataclasses import fields

        from sasa_train.sweep.planning import SweepConfig

        knobs |= {f"sweep.{knob.name}": knob.metadata["help"] for knob in fields(SweepConfig)}
    return knobs if COMMANDS[name].reads == "configs" else knobs | {"weights": "the average, or the model's own"}


def of_overrides(current: str, groups: Sequence[str], knobs: dict[str, str], is_sweep: bool) -> Found:
    """`model=` and `trainer.`, then `trainer.epochs=`, then the values that are known; in a sweep after each comma."""
    key, equals, value = current.partition("=")
    if equals:
        given = value.rpartition(",")[0] + "," if is_sweep and "," in value else ""
        words = choices(key) if key in groups else [*_words(key)]
        found = dict.fromkeys([given + word for word in words], "")
        found |= paths(value) if key in PATH_KEYS else {}
        return {f"{key}={word}": meaning for word, meaning in found.items()}
    found = {f"{group}=": "a file in configs/" for group in groups}
    for knob, meaning in knobs.items():
        prefix = knob[: knob.rfind(".") + 1]
        found |= {f"{knob}=": meaning} if current.startswith(prefix) else {prefix: "keys"}
    return found


def _words(key: str) -> Sequence[str]:
    knob = key_table().get(key)
    if knob is not None and bool in (knob.type, *typing.get_args(knob.type)):
        return ("true", "false")
    return WORDS.get(key, ())


def paths(prefix: str) -> Found:
    """Files, and folders with a / at their end; hidden ones where the dot is given."""
    folder, name = os.path.split(prefix)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return {}
    shown = [e for e in entries if e.name.startswith(name) and (name or not e.name.startswith("."))]
    return {os.path.join(folder, e.name) + "/" * e.is_dir(): "" for e in shown if e.name.isprintable()}
