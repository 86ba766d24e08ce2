"""sasa-visualize: figures of what a run has learned and what its attention looks at, as files and in TensorBoard."""

import argparse
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.commands import described, end_command, positive, run
from sasa_train.extras import why_not
from sasa_train.refusal import ConfigError
from sasa_train.runs.source import check_source, similar_runs
from sasa_train.terminal import FAILED, fail
from sasa_train.visualize.names import FIGURES, NAMES, OF_SEVERAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sasa_train.visualize.drawing import Choice

FORMATS = ("png", "svg")
EPILOG = (
    """figures (default: all that the run can have):
"""
    + "".join(f"  {name:<20} {meaning}\n" for name, meaning in FIGURES.items())
    + """
examples:
  sasa-visualize outputs/RUN_NAME                                       all, in outputs/RUN_NAME/figures/
  sasa-visualize outputs/RUN_NAME confusion_matrix mistakes --formats png svg
  sasa-visualize outputs/RUN_NAME attention_maps attention_heads --images cat.jpg dog.jpg --pixels 30,40 50,60
  sasa-visualize outputs/RUN_NAME data.root=/elsewhere weights=raw      key=value: keys over the checkpoint's config
  sasa-visualize outputs/RUN_1 outputs/RUN_2 --out compared             curves and learning rates of several, overlaid

Exit codes: 0 done, 2 refused and nothing drawn, 1 some figures could not be drawn, as without data."""
)


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments and return its exit code."""
    return run(build_parser(), arguments, draw, has_overrides=True)


def draw(options: argparse.Namespace) -> int:
    if reason := why_not("sasa-visualize", "plots"):
        raise ConfigError(reason)
    sources, names = split_words(options.words)
    return visualize_several(sources, names, options) if len(sources) > 1 else visualize(sources[0], names, options)


def build_parser() -> argparse.ArgumentParser:
    parser = described(
        prog="sasa-visualize",
        usage="sasa-visualize RUN [RUN ...] [FIGURE ...] [options] [key=value ...]",
        description=__doc__,
        epilog=EPILOG,
    )
    parser.add_argument(
        "words", nargs="*", metavar="RUN [FIGURE] [key=value]", help="run folders or one checkpoint, figures, keys"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: figures/ in the run folder, "
                        "and its TensorBoard)")  # fmt: skip
    parser.add_argument(
        "--formats", "--format", nargs="+", default=["png"], choices=FORMATS, metavar="FORMAT", help="png, svg (png)"
    )
    parser.add_argument("--num-images", default=512, type=positive, metavar="N",
                        help="val images to count and average over, at most (512)")  # fmt: skip
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE",
                        help="images for the attention maps (default: three of val)")  # fmt: skip
    parser.add_argument("--pixels", nargs="+", type=split_pixel, metavar="ROW,COLUMN",
                        help="query pixels, in the image as the model sees it (default: the centre, and the strongest "
                        "contrast away from it)")  # fmt: skip
    parser.add_argument("--layers", type=lambda text: text.split(","), metavar="NAME,...",
                        help="layers of the attention maps (default: the last of each stage)")  # fmt: skip
    parser.add_argument("--heads", type=split_numbers, metavar="N,...", help="heads of attention_heads, from 0")
    return parser


def split_numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} must be numbers with commas between, as in 0,3")
    return [int(part) for part in text.split(",")]


def split_pixel(text: str) -> tuple[int, int]:
    numbers = split_numbers(text)
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text} must be a row and a column, as in 30,40")
    return numbers[0], numbers[1]


def split_words(words: list[str]) -> tuple[list[Path], list[str]]:
    """Split words into runs and figure names; an existing path is treated as a run even if a figure has the same name.

    Raises:
        ConfigError: no run is given, or a word is neither a run nor the name of a figure.
    """
    names = [word for word in words if word in FIGURES and not Path(word).exists()]
    sources = [Path(word) for word in words if word not in names]
    for source in sources[1:]:
        if not source.exists():
            hint = _hint(source) or similar_runs(source)
            raise ConfigError(f"{source}: is neither a file nor one of the figures {', '.join(NAMES)}{hint}")
    if not sources:
        raise ConfigError("give a run folder or a checkpoint, as in sasa-visualize outputs/RUN_NAME")
    return sources, names


def _hint(word: Path) -> str:
    found = difflib.get_close_matches(str(word), NAMES, n=1)
    return f": did you mean {found[0]}?" if found else ""


def visualize(source: Path, names: list[str], options: argparse.Namespace) -> int:
    """Draw the figures of one run and return the exit code.

    Raises:
        WeightsError: the attention weights of a query do not sum to one.
        CheckpointError: `source` contains no readable checkpoint.
        ConfigError: the request is invalid (raised before anything is drawn).
    """
    from sasa_train.terminal import load_torch, printable, say

    check_source(source, options.overrides)
    load_torch()
    from sasa_train.trained import load_trained
    from sasa_train.visualize.drawing import draw_run, not_drawable

    trained = load_trained(source, options.overrides)
    run_dir = run_folder_of(trained.path)
    folder, board_dir = output_folders(run_dir, options.out)
    reasons = not_drawable(trained, run_dir)
    for name in names:
        if name in reasons:
            raise ConfigError(f"{name} cannot be drawn: {reasons[name]}")
    wanted = [name for name in names or NAMES if name not in reasons]
    drawn = []
    try:
        for name, figure, caption in draw_run(trained, run_dir, wanted, options.num_images, choice_of(options)):
            write_figure(figure, name, folder, options.formats, board_dir, trained.checkpoint["step"])
            say(f"{printable(str(folder))}/{name}.{suffix(options.formats)}\n  {caption}")
            drawn.append(name)
    except ConfigError as error:
        if not drawn:
            raise
        fail(ConfigError(f"not drawn: {', '.join(name for name in wanted if name not in drawn)}: {error}"))
        return FAILED
    for reason in dict.fromkeys(reasons.values()) if not names else ():
        say(f"not drawn: {', '.join(name for name in reasons if reasons[name] == reason)}: {reason}")
    return 0


def visualize_several(sources: list[Path], names: list[str], options: argparse.Namespace) -> int:
    """Overlay the curves of several runs, read from their logs.

    Raises:
        ConfigError: a source is not a run folder, or one of the options applies only to a single run.
    """
    from sasa_train.runs.metrics import read_metrics
    from sasa_train.terminal import printable, say
    from sasa_train.visualize.curve_figures import draw_curves, too_short

    if others := [name for name in names if name not in OF_SEVERAL]:
        raise ConfigError(f"{', '.join(others)}: of one run; several are overlaid in {' and '.join(OF_SEVERAL)}")
    if options.overrides:
        given = " ".join(options.overrides)
        raise ConfigError(f"{given}: the curves of several runs are their logs', which no key changes")
    if options.out is None:
        raise ConfigError(f"{len(sources)} runs are given: say with --out DIR where to write")
    all_rows = []
    for source in sources:
        rows = read_metrics(source / "metrics.jsonl")
        if not rows:
            hint = "" if source.exists() else similar_runs(source)
            raise ConfigError(f"{source}: has no metrics.jsonl with rows; give run folders{hint}")
        all_rows.append(rows)
    labels = names_of(sources) or [source.name for source in sources]
    labels = [str(source) for source in sources] if len(set(labels)) < len(labels) else labels
    runs = {printable(label): rows for label, rows in zip(labels, all_rows, strict=True)}
    if len(runs) < len(sources):
        raise ConfigError(f"{', '.join(runs)}: a run is given twice; give each run once")
    reasons = too_short(runs)
    for name in names or OF_SEVERAL:
        if name in reasons and (names or len(reasons) == len(OF_SEVERAL)):
            raise ConfigError(f"{name} cannot be drawn: {reasons[name]}")
    for name, figure, caption in draw_curves(runs, names or OF_SEVERAL):
        write_figure(figure, name, options.out, options.formats)
        say(f"{options.out}/{name}.{suffix(options.formats)}\n  {caption}")
    for name, reason in () if names else reasons.items():
        say(f"not drawn: {name}: {reason}")
    return 0


def names_of(sources: list[Path]) -> list[str] | None:
    """Name runs by the keys that tell them apart; None if none do or a config cannot be read."""
    from sasa_train.config.differences import names_by_difference
    from sasa_train.runs.folder import load_as_trained

    try:
        return names_by_difference([load_as_trained(source) for source in sources])
    except ConfigError:
        return None


def choice_of(options: argparse.Namespace) -> "Choice":
    from sasa_train.visualize.drawing import Choice

    return Choice(options.images, options.layers, options.heads, options.pixels)


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder that contains the checkpoint, or None."""
    if not checkpoint.parent.name:  # the checkpoint is in the current folder
        checkpoint = checkpoint.absolute()
    run_dir = checkpoint.parent.parent
    is_run = checkpoint.parent.name == "checkpoints" and (run_dir / "config.yaml").is_file()
    return run_dir if is_run else None


def output_folders(run_dir: Path | None, out: Path | None) -> tuple[Path, Path | None]:
    """Return the output folder for figures and the run's TensorBoard folder, which is None if --out is given.

    Raises:
        ConfigError: the checkpoint is not in a run folder, or the folder contains links that point outside it.
    """
    from sasa_train.runs.folder import check_entries

    if out is not None:
        return out, None
    if run_dir is None:
        raise ConfigError("the checkpoint is not in a run folder: say with --out DIR where to write")
    check_entries(run_dir)
    return run_dir / "figures", run_dir / "tensorboard"


def suffix(formats: list[str]) -> str:
    return formats[0] if len(formats) == 1 else f"{{{','.join(formats)}}}"


def write_figure(
    figure: "Figure", name: str, folder: Path, formats: list[str], board_dir: Path | None = None, step: int = 0
) -> None:
    from sasa_train.figures import rendered
    from sasa_train.files import write_outputs
    from sasa_train.visualize.board import write_to_board

    png = rendered(figure)
    write_outputs(folder, {f"{name}.{kind}": png if kind == "png" else rendered(figure, kind) for kind in formats})
    if board_dir is not None:
        write_to_board(board_dir, name, png, step)
