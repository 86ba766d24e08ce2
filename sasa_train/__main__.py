"""`python -m sasa_train` lists the commands; `python -m sasa_train train ...` is sasa-train, and so on.

`python -m sasa_train completion bash`, zsh or fish prints what makes a shell complete all of them.
"""

import importlib
import sys

from sasa_train import __version__
from sasa_train.commands import COMMANDS

USAGE = """usage: python -m sasa_train COMMAND ...   (sasa-COMMAND ... is the same; --help says more about each)
"""
MORE = """
  completion   bash, zsh or fish: prints what to load there, as in  source <(python -m sasa_train completion bash)
  --version"""
DONE, REFUSED = 0, 2


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        # From here on all is as if it had been called by its own name: messages, run.json, exit codes.
        name = sys.argv[1]
        sys.argv = [f"sasa-{name}", *sys.argv[2:]]
        importlib.import_module(COMMANDS[name].module).main()
        return
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """What is none of the commands; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {command.about}" for name, command in COMMANDS.items()]
        print("\n".join([USAGE, *lines]) + MORE)
        return DONE
    if arguments == ["--version"]:
        print(f"sasa_train {__version__}")
        return DONE
    from sasa_train.config import completion

    if arguments[0] == "complete":  # what the shells' scripts call
        print(completion.answer(arguments[1], arguments[2:]))
        return DONE
    if arguments[0] == "completion" and len(arguments) == 2 and arguments[1] in completion.SCRIPTS:
        print(completion.script(arguments[1]), end="")
        return DONE
    what = "completion takes bash, zsh or fish" if arguments[0] == "completion" else f"there is no {arguments[0]}"
    print(f"sasa_train: {what}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    main()
