"""sasa-export: export a model to safetensors, a Hugging Face Hub folder, ONNX or torch.export, and verify each file."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.commands import described, end_command, run
from sasa_train.extras import why_not
from sasa_train.files import inside
from sasa_train.refusal import ConfigError
from sasa_train.runs.source import check_source
from sasa_train.terminal import DONE, FAILED, columns, fail, fitting, load_torch, printable

if TYPE_CHECKING:
    from sasa_train.export.checking import Measured
    from sasa_train.trained import TrainedModel

FORMAT_NAMES = ("safetensors", "hub", "onnx", "torch_export")
EPILOG = """examples:
  sasa-export outputs/RUN_NAME                                all formats, into outputs/RUN_NAME/export/
  sasa-export FILE.pt --formats onnx --out exported --images photos
  sasa-export outputs/RUN_NAME weights=raw data.root=/elsewhere

key=value are keys over the checkpoint's config; weights=raw takes the model's own weights, where the run kept an
exponential moving average (the default then). A format is written aside, read again, run on real images (the run's val,
or --images) and put in its place only where its logits are PyTorch's: to the bit, or to 1e-5 of the largest for onnx
and torch_export, which sum in another order.
Exit codes: 0 done, 2 refused, 1 a format failed."""


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments; return the exit code."""
    return run(build_parser(), arguments, export, has_overrides=True)


def build_parser() -> argparse.ArgumentParser:
    usage = "sasa-export CHECKPOINT [--formats FORMAT ...] [--out DIR] [--images FOLDER] [key=value ...]"
    parser = described(prog="sasa-export", usage=usage, description=__doc__, epilog=EPILOG)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run folder or a checkpoint file")
    parser.add_argument("misspelt", nargs="*", help=argparse.SUPPRESS)  # refused as unknown keys, with a suggestion
    known = ", ".join(FORMAT_NAMES)
    parser.add_argument("--formats", "--format", nargs="+", choices=FORMAT_NAMES, metavar="FORMAT", help=known)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; left out: export/ in the run's folder")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images to check on; left out: the run's val")
    return parser


def export(options: argparse.Namespace) -> int:
    """Load the model, measure it in PyTorch, and export and verify each format in turn; return the exit code.

    Raises:
        CheckpointError: there is no readable checkpoint.
        ConfigError: overrides are invalid, images or packages are missing, or the folder is not writable.
    """
    overrides, names = options.overrides + options.misspelt, available_formats(options.formats)
    check_source(options.checkpoint, overrides)
    load_torch()
    from sasa_train.export.checking import load_images, measure
    from sasa_train.export.formats import FORMATS, Source
    from sasa_train.export.making import ExportError, make, megabytes, sweep
    from sasa_train.files import locked
    from sasa_train.terminal import progress_bar, say
    from sasa_train.trained import load_trained

    trained = load_trained(options.checkpoint, overrides)
    images, of_what = load_images(trained, options.images)
    folder = options.out or output_folder(trained.path)
    source, exit_code = Source(trained), DONE
    with locked(folder, f"--out {folder}"), progress_bar(bar_format="{desc}") as doing:
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"--out {folder}: cannot be written; give another folder")
        sweep(folder)
        doing.set_description_str("measuring PyTorch ...")
        expected = measure(trained.model, images)
        if not all(logits.isfinite().all() for logits in expected.logits):
            raise ConfigError(f"{trained.path}: its logits are not finite; there is nothing to compare an export with")
        print_head(trained, of_what, expected, folder)
        for name in names:
            doing.set_description_str(f"writing {name}, reading it back and comparing its logits ...")
            try:
                found = make(FORMATS[name], source, folder, images, expected)
            except ExportError as error:
                fail(ExportError(f"{name}: {error}"))
                exit_code = FAILED
                continue
            target = FORMATS[name].target
            difference = f"{found.difference(expected):<18.1e}"
            say(row(name, megabytes(folder / target), found.images_per_second, difference, target))
    if exit_code == DONE:
        say("\nnext        docs/export.md: use the files in timm, onnxruntime or plain PyTorch")
    return exit_code


def print_head(trained: "TrainedModel", of_what: str, expected: "Measured", folder: Path) -> None:
    import torch

    from sasa_train.export.checking import BATCH_SIZES
    from sasa_train.export.making import megabytes
    from sasa_train.terminal import say

    say(f"{printable(trained.path)}: {trained.config.model.title}, {trained.weights} weights")
    threads = "1 CPU thread" if (count := torch.get_num_threads()) == 1 else f"{count} CPU threads"
    say(f"checked on {of_what}; images/s with {threads} of this machine")
    say(f"files in {printable(shlex.quote(str(folder)))}\n")
    batches = "".join(f"{f'batch {size}':>10}" for size in BATCH_SIZES)
    say(fitting([(0, f"{'format':<12}{'MB':>7}{batches}  largest difference"), (1, "file")], columns(sys.stdout)))
    say(row("PyTorch", megabytes(trained.path), expected.images_per_second))


def row(name: str, size: float, speeds: list[float], difference: str = "", target: str = "") -> str:
    """Format a row of the table, without the file's name if the terminal has no room for it."""
    numbers = f"{name:<12}{size:>7.2f}" + "".join(f"{speed:>10,.1f}" for speed in speeds)
    return fitting([(0, numbers), (0, difference), (1, target)], columns(sys.stdout))


def available_formats(asked: list[str] | None) -> list[str]:
    """Return the requested formats or, if none are given, all formats whose packages are installed."""
    reason = why_not("onnx", "export")
    if reason and "onnx" in (asked or ()):
        raise ConfigError(reason)
    if asked or not reason:
        return asked or list(FORMAT_NAMES)
    print(f"left out: {reason}", file=sys.stderr)
    return [name for name in FORMAT_NAMES if name != "onnx"]


def output_folder(checkpoint: Path) -> Path:
    """Return export/ in the run folder, or beside the checkpoint if it is not in a run folder."""
    folder = checkpoint.parent
    return inside(folder.parent if folder.name == "checkpoints" else folder, "export")
