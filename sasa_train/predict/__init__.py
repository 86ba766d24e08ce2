"""sasa-predict: predict the most probable classes of image files with a trained model."""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tqdm import tqdm

from sasa_train.commands import described, end_command, positive, run
from sasa_train.files import write_atomic
from sasa_train.predict.find_images import LISTED, NUL, SEPARATOR, Found, find_images
from sasa_train.predict.table import FORMATS, Row, as_table
from sasa_train.refusal import ConfigError, ExpectedFailure
from sasa_train.runs.source import check_source
from sasa_train.terminal import DONE, FAILED, columns, load_torch, printable, progress_bar, warn

if TYPE_CHECKING:
    from sasa_train.predict.inference import Predictor

USAGE = "sasa-predict RUN_OR_CHECKPOINT PATH... [options] [weights=ema|raw] [key=value ...]"

EPILOG = """PATH is a file, however it is called; a folder, searched with all its folders for images; a quoted
pattern ('photos/**/*.jpg'); or - for files and folders from stdin, one per line. Rows come in this order.

Images are prepared as val was in training. One that cannot be read is named on stderr with the reason and has no line
in the table; in CSV and JSON lines its row has an `error`.

examples:
  sasa-predict outputs/RUN photo.jpg holiday/
  sasa-predict outputs/RUN holiday/ --top-k 1 --format csv --output holiday.csv
  find photos -name '*.jpg' -print0 | sasa-predict outputs/RUN - --null --format jsonl trainer.device=cuda

weights=raw takes the model's own weights, where the run kept an exponential moving average (the default then); other
words key=value are keys over the checkpoint's config: trainer.device, trainer.precision, data.num_workers (threads
that read images).

Exit codes: 0 every image was predicted; 1 one could not be, or failed; 2 refused, or no image was found at all."""

TOP_K = 5


def main() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sasa-predict ... | head` ends without an error
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments; return the exit code."""
    return run(build_parser(), arguments, predict_or_advise)


def predict_or_advise(options: argparse.Namespace) -> int:
    """Run `predict_command`; if it runs out of memory, suggest a smaller batch size."""
    from sasa_train.machine import is_out_of_memory

    try:
        return predict_command(options)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ExpectedFailure(f"out of memory; use less than --batch-size {options.batch_size} ({error})") from error


def build_parser() -> argparse.ArgumentParser:
    parser = described(prog="sasa-predict", usage=USAGE, description=__doc__, epilog=EPILOG)
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder or a checkpoint file")
    parser.add_argument("words", metavar="PATH", nargs="+", help="images, as described below")
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=positive,
        help=f"classes per image ({TOP_K}; on a terminal, those of them that fit)",
    )
    parser.add_argument("--format", choices=list(FORMATS), default="table", help="(table)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="written whole, at the end; left out: stdout")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=64, help="images at a time (64)")
    parser.add_argument("-0", "--null", action="store_true", help="names on stdin end in NUL, as find -print0 has them")
    return parser


def predict_command(options: argparse.Namespace) -> int:
    """Load the model, find the images, and print or write the predictions.

    Raises:
        CheckpointError: there is no readable checkpoint.
        ConfigError: a path, an override or the output is invalid, or there are no images.
        OSError: the rows cannot be written.
    """
    from sasa_train.config.overrides import split_overrides

    words, overrides = split_overrides(options.words)
    if not words:
        raise ConfigError("no PATH is given; give files, folders, patterns, or - for a list on stdin")
    out = options.output
    if out is not None and out.exists() and not out.is_file():  # writing must not replace a device
        raise ConfigError(f"--output {printable(out)}: is not a file; give a file, or leave it out")
    check_source(options.checkpoint, overrides)
    load_torch()
    from sasa_train.predict.inference import Predictor
    from sasa_train.trained import load_trained

    trained, tally = load_trained(options.checkpoint, overrides), Tally()
    predictor = Predictor(trained, options.top_k or TOP_K)
    if out is None:
        write_rows(show, predictor, words, options, tally)
    else:
        write_whole(out, lambda file: write_rows(file.write, predictor, words, options, tally))
    print(tally.summary(), file=sys.stderr)
    print(f"model  {printable(trained.path)}, step {trained.checkpoint['step']}", file=sys.stderr)
    if out is not None:
        print(f"wrote  {printable(out)}", file=sys.stderr)
    return FAILED if tally.bad else DONE


@dataclass
class Tally:
    """The numbers of files that were found, predicted (`good`) and not predicted (`bad`)."""

    found: int = 0
    good: int = 0
    bad: int = 0

    def summary(self) -> str:
        bad = f"; {self.bad:,} could not be, for the reasons above" if self.bad else ""
        return f"{self.good:,} {'image' if self.good == 1 else 'images'} predicted{bad}"


def write_rows(
    write: Callable[[bytes], object],
    predictor: "Predictor",
    words: list[str],
    options: argparse.Namespace,
    tally: Tally,
) -> None:
    """Find images, predict their classes and write the rows, one batch at a time.

    Raises:
        ConfigError: there are no images, or stdin does not contain a list of names.
    """
    from sasa_train.data.listing import LeftOut

    find, left_out = partial(find_images, words, NUL if options.null else SEPARATOR), LeftOut()
    width = columns(sys.stdout) if options.output is None and options.top_k is None else None
    to_text = partial(as_table, width=width) if options.format == "table" else FORMATS[options.format]
    with counting_bar(find, words) as bar:
        rows = predictor.rows(counted(find(left_out=left_out), tally), options.batch_size)
        for text in to_text(reported(rows, tally, bar), predictor.top_k):
            write(text.encode("utf-8", "surrogateescape"))
    if told := left_out.describe():
        print(f"left out, {told}", file=sys.stderr)
    for told in left_out.describe_doubtful():
        print(told, file=sys.stderr)
    if not tally.found:
        raise ConfigError("no image was found")


def show(text: bytes) -> None:
    """Write to stdout immediately, above the progress bar if it is on the same terminal."""
    # Flushed, so that finished predictions are not lost if the command is stopped.
    with tqdm.external_write_mode(sys.stdout) if sys.stdout.isatty() else contextlib.nullcontext():
        if hasattr(sys.stdout, "buffer"):
            sys.stdout.buffer.write(text)
        else:  # as in notebooks and in contextlib.redirect_stdout(io.StringIO())
            sys.stdout.write(text.decode("utf-8", "surrogateescape"))
        sys.stdout.flush()


def counted(found: Iterator[Found], tally: Tally) -> Iterator[Found]:
    for one in found:
        tally.found += not one.fault
        yield one


def reported(batches: Iterator[list[Row]], tally: Tally, bar: tqdm) -> Iterator[list[Row]]:
    """Warn about files that could not be predicted, and count all files."""
    for rows in batches:
        bad = [row for row in rows if row.error]
        for row in bad:
            warn(f"{printable(row.path)}: {printable(row.error)}")
        tally.bad += len(bad)
        tally.good += len(rows) - len(bad)
        bar.update(len(rows))
        yield rows


def counting_bar(find: Callable[[], Iterator[Found]], words: list[str]) -> tqdm:
    """Create the progress bar, which is shown if stderr is a terminal."""
    # Files are counted in a thread, so that the first rows of a large folder appear immediately.
    bar = progress_bar(desc="predicting", unit="img")

    def count() -> None:
        bar.total = sum(1 for _ in find())

    if not bar.disable and LISTED not in words:
        threading.Thread(target=count, daemon=True).start()
    return bar


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically with `write`; raise ConfigError if it cannot be created."""
    try:
        write_atomic(path, write)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"--output {printable(path)}: cannot be written ({error.strerror})") from error
