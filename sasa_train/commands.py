"""The commands: one table for `python -m sasa_train` and for shell completion, and how each of them ends."""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from sasa_train.terminal import FAILED, fail


class Command(NamedTuple):
    """Where a command is, what it does, and what a shell completes for it besides what its parser says."""

    module: str
    about: str
    reads: str  # "configs": groups and knobs; "runs": files, and knobs over a run's config; "files"; "nothing"
    options: tuple[str, ...] = ()  # where `module` has no build_parser()


COMMANDS = {
    "train": Command("sasa_train.train", "train a model, or go on", "configs", ("--multirun", "--help", "--version")),
    "evaluate": Command("sasa_train.evaluate", "top1, top5 and loss of a checkpoint on val", "runs"),
    "predict": Command("sasa_train.predict", "classes of image files, by a checkpoint", "runs"),
    "visualize": Command("sasa_train.visualize", "pictures of what a model attends to and gets wrong", "runs"),
    "export": Command("sasa_train.export", "to safetensors, a Hub folder, ONNX, torch.export", "runs"),
    "sweep": Command("sasa_train.sweep", "many runs from one command", "configs", ("--help",)),
    "report": Command("sasa_train.report", "runs and sweeps compared: tables, plots, an HTML page", "runs"),
    "summary": Command("sasa_train.summary", "a model's layers and their cost", "configs", ("--paper", "--help")),
    "benchmark": Command("sasa_train.benchmark", "time and memory of attention and of models", "nothing"),
    "data": Command("sasa_train.dataset_tool", "check a data set, prepare ImageNet, pack shards", "files"),
}


def end_command(run_command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command that has no checkpoints to save, and exit; Ctrl-C and a closed pipe are no errors in the code."""
    try:
        code = run_command(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail(RuntimeError("stopped"))
        code = FAILED
    except BrokenPipeError:  # as in `sasa-summary | head`; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)
