"""The table of commands, and their common argument parsing and error handling."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from sasa_train.refusal import CheckpointError, ConfigError, ExpectedFailure, causes
from sasa_train.terminal import DONE, FAILED, REFUSED, escape_unknown_letters, fail


class Command(NamedTuple):
    """A command's module, its description, and the completions offered in addition to its parser's options."""

    module: str
    about: str
    reads: str  # "configs": groups and keys; "runs": files, and keys over a run's config; "files"; "nothing"
    options: tuple[str, ...] = ()  # for a module without build_parser()


COMMANDS = {
    "train": Command(
        "sasa_train.train",
        "train a model, or go on",
        "configs",
        ("--multirun -m", "--cfg", "--plan", "--help", "--version"),
    ),
    "evaluate": Command("sasa_train.evaluate", "top1, top5 and loss of a checkpoint on val", "runs"),
    "predict": Command("sasa_train.predict", "classes of image files, by a checkpoint", "runs"),
    "demo": Command("sasa_train.demo", "a local page: an image's classes, and where its pixels look", "runs"),
    "visualize": Command("sasa_train.visualize", "pictures of what a model attends to and gets wrong", "runs"),
    "export": Command("sasa_train.export", "to safetensors, a Hub folder, ONNX, torch.export", "runs"),
    "sweep": Command("sasa_train.sweep", "many runs from one command", "configs", ("--help",)),
    "report": Command("sasa_train.report", "runs and sweeps compared: tables, plots, an HTML page", "runs"),
    "summary": Command("sasa_train.summary", "a model's layers and their cost", "configs", ("--paper", "--help")),
    "benchmark": Command("sasa_train.benchmark", "time and memory of attention and of models", "nothing"),
    "data": Command("sasa_train.dataset_tool", "check a data set, prepare ImageNet, pack shards", "files"),
}


class Parser(argparse.ArgumentParser):
    """A parser that suggests the most similar option for one that it does not have."""

    def error(self, message: str) -> NoReturn:
        known = re.findall(r"(?<![\w-])--[a-z][\w-]*", self.format_help())
        if found := re.match(r"unrecognized arguments: (?:.* )?(--[\w-]+)", message):
            longer = [option for option in known if option.startswith(found[1])]
            if close := longer or difflib.get_close_matches(found[1], known, n=1):
                message += f": did you mean {close[0]}?"
        super().error(message)


def described(build: Callable[..., argparse.ArgumentParser] = Parser, **texts: Any) -> argparse.ArgumentParser:
    """Create a parser or subparser that prints its description and epilog unchanged."""
    return build(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)


def positive(text: str) -> int:
    """Convert an option's value to a positive integer; raise argparse.ArgumentTypeError if it is not one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def run(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    work: Callable[[argparse.Namespace], int | None],
    has_overrides: bool = False,
    has_subcommands: bool = False,
) -> int:
    """Parse a command line, call `work` and return the exit code; expected errors are printed as messages.

    has_overrides: whether overrides are allowed; they bypass the parser and are stored in `options.overrides`.
    """
    if not arguments:
        parser.print_help()
        return REFUSED
    overrides: list[str] = []
    if has_overrides:
        from sasa_train.config.overrides import split_overrides

        arguments, overrides = split_overrides(arguments)
    # A shell's *.png may yield a file named -x.png, which is not an option.
    arguments = [f"./{word}" if word.startswith("-") and os.path.isfile(word) else word for word in arguments]
    try:
        options = parser.parse_args(arguments) if has_subcommands else parser.parse_intermixed_args(arguments)
    except SystemExit as stop:  # after --help or an argparse error
        return int(stop.code or DONE)
    if has_overrides:
        options.overrides = overrides
    try:
        return work(options) or DONE
    except (ConfigError, CheckpointError) as error:
        return fail(error)
    except BrokenPipeError:  # see end_command
        raise
    except (ExpectedFailure, OSError) as error:  # for example, a full or failing disk
        fail(error)
        return FAILED


def is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C led to an error: code that it cuts short may fail in its own cleanup."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in causes(error))


def end_command(run_command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command that has no checkpoints to save, then exit; Ctrl-C and closed pipes cause no traceback."""
    escape_unknown_letters()
    try:
        code = run_command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # as in `sasa-summary | head`; Python flushes again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except (KeyboardInterrupt, Exception) as error:
        if not is_interrupt(error):
            raise
        fail(RuntimeError("stopped"))
        code = FAILED
    sys.exit(code)
