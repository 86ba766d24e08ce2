"""sasa-report: a sweep's jobs as a table with confidence intervals, beside the paper's numbers, and as plots."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.compose import fail
from sasa_train.config import ConfigError

if TYPE_CHECKING:
    from sasa_train.report.rows import Report

NO_MATPLOTLIB = "no plots: matplotlib is not installed; pip install 'sasa_train[plots]'"
EPILOG = """examples:
  sasa-report outputs/SWEEP                          table.md, .csv, .json and plots in outputs/SWEEP/report/
  sasa-report outputs/SWEEP --reference kernel_size=7
  sasa-report outputs/RUN_1 outputs/RUN_2 --out compared
  sasa-report outputs                                every run in the folder, as sasa-train -m leaves them

A row is what differs in its seed alone: mean top1 of the last epoch with the 95 % confidence interval over seeds, and
the difference to a reference row, paired by seed. Jobs that are not done are listed below the table.
Exit codes: 0 done, 2 refused."""


def main() -> None:
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # after --help or argparse's own refusal
        return int(stop.code or 0)
    try:
        report(options)
    except ConfigError as error:
        return fail(error)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sasa-report", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="SWEEP_OR_RUN", help="sweep or run folders")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; left out: report/ in the one folder")
    parser.add_argument(
        "--reference", metavar="ROW", help="the row to compare with: its label, a part of it, its number"
    )
    parser.add_argument(
        "--paper-table",
        type=int,
        choices=(1, 3, 4, 5, 6, 7),
        help="the paper's table to set beside; left out: the sweep's",
    )
    return parser


def report(options: argparse.Namespace) -> None:
    """Read, compute, write, print.

    Raises:
        ConfigError: what cannot be read or written, or is not there.
    """
    from sasa_train.console import say
    from sasa_train.printable import printable_lines
    from sasa_train.report.jobs import find_jobs
    from sasa_train.report.page import PAGE
    from sasa_train.report.rows import build_report
    from sasa_train.report.tables import as_csv, as_json, markdown

    folder = output_folder(options)
    found = find_jobs(options.sources)
    table = options.paper_table or (min(found.paper_tables) if len(found.paper_tables) == 1 else None)
    built = build_report(found.jobs, table, options.reference, found.commands)
    text = printable_lines(markdown(built))
    files = {"table.md": text.encode(), "table.csv": as_csv(built).encode(), "table.json": as_json(built).encode()}
    charts: dict[str, bytes] = {}
    if importlib.util.find_spec("matplotlib") is None:
        print(NO_MATPLOTLIB, file=sys.stderr)
    else:
        from sasa_train.report.charts import draw_charts

        charts = draw_charts(built)
    files |= charts | {PAGE: build_page(built, options, charts, folder).encode()}
    write_files(folder, files)
    say(text)
    say(f"{folder}: {', '.join(files)}")


def build_page(report: "Report", options: argparse.Namespace, charts: dict[str, bytes], folder: Path) -> str:
    from sasa_train.report.page import run_page, sweep_page, the_run
    from sasa_train.report.pictures import of_charts

    job = the_run(report)
    if job is None:
        return sweep_page(report, options.sources, of_charts(charts), [] if charts else [NO_MATPLOTLIB], folder)
    return run_page(report, job, [], folder)


def output_folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return options.out
    if len(options.sources) > 1:
        raise ConfigError(f"{len(options.sources)} folders are given: say with --out DIR where to write")
    return options.sources[0] / "report"


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    from sasa_train.atomic import write_atomic

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); give another place with --out") from error


if __name__ == "__main__":
    main()
