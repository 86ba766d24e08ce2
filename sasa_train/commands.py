"""The commands: one table for `python -m sasa_train` and for shell completion."""

from typing import NamedTuple


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
    "visualize": Command("sasa_train.visualize.__main__", "pictures of what a model attends to and gets wrong", "runs"),
    "export": Command("sasa_train.export.__main__", "to safetensors, a Hub folder, ONNX, torch.export", "runs"),
    "sweep": Command("sasa_train.sweep.__main__", "many runs from one command", "configs", ("--help",)),
    "report": Command("sasa_train.report.__main__", "runs and sweeps compared: tables and plots", "files"),
    "summary": Command("sasa_train.summary", "a model's layers and their cost", "configs", ("--paper", "--help")),
    "benchmark": Command("sasa_train.benchmark.__main__", "time and memory of attention and of models", "nothing"),
    "data": Command("sasa_train.data.__main__", "check a data set, prepare ImageNet, pack shards", "files"),
}
