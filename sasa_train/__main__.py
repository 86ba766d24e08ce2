"""`python -m sasa_train`, which lists and runs the commands (`python -m sasa_train train ...` runs sasa-train).

`python -m sasa_train completion bash` (or zsh, fish) prints the shell script that enables completion for all commands.
"""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field
from typing import Any

from sasa_train import __version__
from sasa_train.commands import COMMANDS
from sasa_train.config.completion import complete_override
from sasa_train.config.groups import GROUPS
from sasa_train.config.keys import key_table
from sasa_train.terminal import DONE, REFUSED

USAGE = """usage: python -m sasa_train COMMAND ...   (sasa-COMMAND ... is the same; --help says more about each)
"""
MORE = """
  completion   bash, zsh or fish: prints what to load there, as in  source <(python -m sasa_train completion bash)
  --version"""
# -P: pressing TAB must not run a file in the current folder that is named like a standard library module.
ANSWER = {
    "fish": "function _sasa_train\n    {python} -P -m sasa_train complete\nend\n",
    "bash": "_sasa_train() {{ {python} -P -m sasa_train complete; }}\n",
}
ANSWER["zsh"] = "(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}\n" + ANSWER["bash"]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        # Messages, run.json and exit codes are then the same as if the command had been called by its own name.
        name = sys.argv[1]
        sys.argv = [f"sasa-{name}", *sys.argv[2:]]
        importlib.import_module(COMMANDS[name].module).main()
        return
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Handle help, version, completion and invalid arguments, but run no command; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {command.about}" for name, command in COMMANDS.items()]
        print("\n".join([USAGE, *lines]) + MORE)
        return DONE
    if arguments == ["--version"]:
        print(f"sasa_train {__version__}")
        return DONE
    if arguments == ["complete"] and "COMP_LINE" in os.environ:  # called by the shell scripts
        complete()
    if arguments[0] == "completion" and len(arguments) == 2 and arguments[1] in ANSWER:
        print(completion_script(arguments[1]))
        return DONE
    what = "completion takes bash, zsh or fish" if arguments[0] == "completion" else f"there is no {arguments[0]}"
    print(f"sasa_train: {what}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
    return REFUSED


def completion_script(shell: str) -> str:
    """Return the script that makes `shell` complete the commands with the current Python interpreter."""
    from argcomplete import shellcode

    commands = [f"sasa-{name}" for name in COMMANDS]
    ours = ANSWER[shell].format(python=shlex.quote(sys.executable))
    return ours + shellcode(commands, use_defaults=False, shell=shell, argcomplete_script="_sasa_train")


def complete() -> None:
    """Print shell completions for the command line in COMP_LINE, then exit."""
    import argcomplete

    name = os.path.basename(os.environ["COMP_LINE"].split()[0]).removeprefix("sasa-")
    offer: Any = completer(name)
    argcomplete.autocomplete(parser_of(name), always_complete_options=False, default_completer=offer)


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return a command's own parser or, if the command uses Hydra's grammar, a parser for its few options."""
    command = COMMANDS[name]
    if not command.options:
        return importlib.import_module(command.module).build_parser()
    parser = argparse.ArgumentParser(add_help=False)
    for option in command.options:
        parser.add_argument(*option.split(), action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


def completer(name: str) -> Callable[..., Iterable[str]]:
    """Return the argcomplete completer for a command's positional arguments, which are files, overrides or both."""
    from argcomplete.completers import FilesCompleter

    reads, keys, paths = COMMANDS[name].reads, keys_of(name), FilesCompleter()

    def words(prefix: str, action: argparse.Action, parsed_args: argparse.Namespace, **_: object) -> Iterable[str]:
        key, equals, value = prefix.partition("=")
        bounds = keys[key].metadata["bounds"] if key in keys else None
        if equals and bounds and bounds.is_path:
            return [f"{key}={path}" for path in paths(value)]
        is_file = action.option_strings or action.dest in ("source", "checkpoint")  # the run is the first argument
        if is_file or reads in ("files", "nothing"):
            return paths(prefix)
        groups = () if reads == "runs" else (*GROUPS, "sweep") if name == "sweep" else GROUPS
        is_sweep = name == "sweep" or getattr(parsed_args, "multirun", False)
        meanings = {key: field.metadata["help"] for key, field in keys.items()}
        if reads == "configs":
            return complete_override(prefix, groups, meanings, is_sweep)
        meanings["weights"] = "the average, or the model's own"
        return dict.fromkeys(paths(prefix), "") | complete_override(prefix, groups, meanings)

    return words


def keys_of(name: str) -> dict[str, Field]:
    if name != "sweep":
        return key_table()
    from sasa_train.sweep.planning import SweepConfig

    return key_table() | key_table(SweepConfig, "sweep.")


if __name__ == "__main__":
    main()
