"""sasa-report: tabulate a sweep's jobs with confidence intervals and the paper's results; write plots and a page."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.commands import described, end_command, positive, run
from sasa_train.files import inside
from sasa_train.paper import VARIED
from sasa_train.refusal import ConfigError
from sasa_train.terminal import load_torch, say, warn

if TYPE_CHECKING:
    from sasa_train.report.jobs import Job
    from sasa_train.report.page import Section
    from sasa_train.report.rows import Report
    from sasa_train.report.verdict import Chance

MAX_NAMED = 6  # runs in a TensorBoard command that names each
EPILOG = """examples:
  sasa-report outputs/SWEEP                          report.html, table.md, .csv, .json, plots: in outputs/SWEEP/report/
  sasa-report outputs/SWEEP --reference kernel_size=7
  sasa-report outputs/RUN_1 outputs/RUN_2 --out compared
  sasa-report outputs/SWEEP --x flops                top1 over the cost of training, and the best at each cost
  sasa-report outputs                                every run in the folder, as sasa-train -m leaves them
  sasa-report --list                                 the runs in outputs/, by top1 of the last epoch, and what differs
  sasa-report outputs/RUN data.root=/elsewhere       one run: its report.html also shows classes and attention

A row groups the jobs that differ only in their seed: mean top1 of the last epoch with the 95 % confidence interval over
seeds, and the difference to a reference row, paired by seed. Unfinished jobs are listed below the table.
Exit codes: 0 done, 2 refused."""


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments and return its exit code."""
    return run(build_parser(), arguments, report)


def build_parser() -> argparse.ArgumentParser:
    parser = described(
        prog="sasa-report",
        description=__doc__,
        epilog=EPILOG,
    )
    parser.add_argument("sources", nargs="*", metavar="SWEEP_OR_RUN", help="sweep or run folders")
    parser.add_argument("--list", action="store_true", help="only list the runs (default: those in outputs/)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: report/ in the given folder)")
    parser.add_argument(
        "--reference", metavar="ROW", help="the row to compare with: its label, a part of it, its number"
    )
    parser.add_argument(
        "--paper-table",
        type=int,
        choices=tuple(VARIED),
        help="the paper's table to compare with (default: the sweep's)",
    )
    parser.add_argument(
        "--x",
        choices=("flops", "hours", "images", "epochs"),
        help="also draw val top1 over this cost of training, one curve per job, and add the costs to the table",
    )
    parser.add_argument("--quick", action="store_true", help="for one run: skip the pictures that need its model")
    parser.add_argument(
        "--num-images",
        type=positive,
        default=10_000,
        metavar="N",
        help="for one run: the most val images for the figures by class (%(default)s)",
    )
    return parser


def report(options: argparse.Namespace) -> None:
    """Read the runs, compute the statistics, write the files and print the table.

    Raises:
        ConfigError: a folder or file is missing or cannot be read or written.
    """
    from sasa_train.config.overrides import split_overrides

    # The overrides are split off after parsing, because in `--reference kernel_size=7` the value is not an override.
    sources, options.overrides = split_overrides(options.sources)
    options.sources = [Path(source) for source in sources]
    check_keys(options.overrides)
    if options.list:
        from sasa_train.report.jobs import find_jobs
        from sasa_train.report.run_list import list_runs

        say(list_runs(find_jobs(options.sources or [Path("outputs")]).jobs))
        return
    if not sources:
        raise ConfigError("no sweep or run folder is given")
    folder = output_folder(options)
    from sasa_train.report.jobs import find_jobs

    found = find_jobs(options.sources)
    load_torch()  # it is needed to count parameters and FLOPs
    from sasa_train.files import write_outputs
    from sasa_train.report import verdict
    from sasa_train.report.page import PAGE, Section, sweep_page, the_run
    from sasa_train.report.rows import build_report
    from sasa_train.report.tables import as_csv, as_json, markdown
    from sasa_train.terminal import printable_lines

    table = options.paper_table or (min(found.paper_tables) if len(found.paper_tables) == 1 else None)
    built = build_report(found.jobs, table, options.reference, found.commands)
    job = the_run(built)
    check_overrides(options.overrides, job)
    built.x = options.x
    built.val_note = verdict.val_note(built.all_jobs)
    text = printable_lines(markdown(built))
    files = {"table.md": text.encode(), "table.csv": as_csv(built).encode(), "table.json": as_json(built).encode()}
    plots = Section("plots", "Plots")
    if job is None:  # the page of a single run has its own curves
        files |= draw_plots(built, plots)
    write_outputs(folder, files)  # write these first; the page takes longer
    if job is not None:
        page = report_run(built, job, options, folder)
    else:
        say(for_terminal(built, text))
        page = sweep_page(built, options.sources, plots, folder)
    write_outputs(folder, {PAGE: page.encode()})
    say(f"{folder}: {', '.join([*files, PAGE])}")
    if job is None and (board := board_command(built, options.sources)):
        say(f"curves  {board}")


def draw_plots(report: "Report", plots: "Section") -> dict[str, bytes]:
    """Add the charts to the page's section, or why there are none; return their files."""
    if not plots.can_draw():
        warn(*plots.missing)
        return {}
    from sasa_train.report.charts import draw_charts

    plots.pictures = draw_charts(report)
    plots.missing += [] if plots.pictures else ["No job is done with two evaluations: there is nothing to draw."]
    return {f"{picture.name}.png": picture.png for picture in plots.pictures}


def for_terminal(report: "Report", text: str) -> str:
    """Return the table for a terminal's width, or its whole text if stdout is a file or a pipe."""
    from sasa_train.report import tables
    from sasa_train.terminal import columns, printable_lines

    width = columns(sys.stdout)
    return text if width is None else printable_lines(tables.for_terminal(report, width))


def report_run(report: "Report", job: "Job", options: argparse.Namespace, folder: Path) -> str:
    """Print what one run reached and return its page."""
    from sasa_train.report import facts, verdict
    from sasa_train.terminal import columns, printable_lines

    chance = verdict.chance_of([job])
    said = verdict.sentences(job, chance)
    say(printable_lines(facts.for_terminal(job, report.rows[0], said, columns(sys.stdout))))
    return run_page_of(report, job, options, folder, chance, said)


def board_command(report: "Report", sources: list[Path]) -> str:
    """Return the command that shows the runs in TensorBoard; it names a few by what differs. "" if there are none."""
    from sasa_train.config.differences import without_groups
    from sasa_train.terminal import printable

    jobs = [(row, seed, job.run_dir) for row in report.rows for seed, job in sorted(row.jobs.items())]
    boards = [(row, seed, run_dir / "tensorboard") for row, seed, run_dir in jobs if run_dir is not None]
    boards = [board for board in boards if board[2].is_dir()]
    has_seeds = len({seed for _, seed, _ in boards}) > 1
    names = [without_groups(row.label) + f", seed={seed}" * has_seeds for row, seed, _ in boards]
    names = [re.sub(r"[^\w=.+-]+", "-", name.replace(", ", "+")) for name in names]
    # TensorBoard splits its argument at commas and colons. A line that names many runs is not readable.
    is_plain = not re.search("[,:]", "".join(str(path) for _, _, path in boards))
    if 1 < len(boards) <= MAX_NAMED and is_plain and len(set(names)) == len(names):
        spec = ",".join(f"{name}:{path}" for name, (_, _, path) in zip(names, boards, strict=True))
        return f"tensorboard --logdir_spec {printable(shlex.quote(spec))}"
    return f"tensorboard --logdir {printable(shlex.quote(str(sources[0])))}" if boards and len(sources) == 1 else ""


def check_keys(overrides: list[str]) -> None:
    """Raise ConfigError for overrides that are invalid for every run, and import the user's code that they name."""
    from sasa_train.config.overrides import split_weights

    if of_config := split_weights(overrides)[1]:
        from sasa_train.config import saved
        from sasa_train.config.own_keys import use_code

        saved.check_overrides(of_config, "a run's config")
        use_code(of_config)


def check_overrides(overrides: list[str], job: "Job | None") -> None:
    """Raise ConfigError for overrides that this run's config refuses, or if there is no single run to apply them to."""
    from sasa_train.config.overrides import split_weights
    from sasa_train.config.saved import load_config_file

    _, of_config = split_weights(overrides)
    of_model = [override for override in overrides if not override.startswith("imports=")]
    if of_model and job is None:
        raise ConfigError(
            f"{' '.join(of_model)}: applies to the pictures of one run's model, but several runs are given"
        )
    if job is not None and job.run_dir is not None:
        load_config_file(job.run_dir / "config.yaml", of_config)


def run_page_of(
    report: "Report",
    job: "Job",
    options: argparse.Namespace,
    folder: Path,
    chance: "Chance | None",
    said: list[str],
) -> str:
    """Build the page of one run, with figures of its model unless --quick is set; report missing figures on stderr."""
    from sasa_train.report.illustrations import curves_section, model_sections
    from sasa_train.report.page import run_page
    from sasa_train.terminal import printable_lines

    sections = [curves_section(job)]
    if not options.quick:
        assert job.run_dir is not None
        sections += model_sections(job.run_dir, options.overrides, options.num_images)
    for section in sections:
        for text in section.missing:
            warn(printable_lines(f"{section.title}: {text}"))
    return run_page(report, job, sections, folder, chance, said)


def output_folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return options.out
    if len(options.sources) > 1:
        raise ConfigError(f"{len(options.sources)} folders are given: say with --out DIR where to write")
    return inside(options.sources[0], "report")
