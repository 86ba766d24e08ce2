"""sasa-report: a sweep's jobs as a table with confidence intervals, beside the paper's numbers, as plots and a page."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.commands import end_command
from sasa_train.extras import has_matplotlib
from sasa_train.refusal import ConfigError
from sasa_train.terminal import fail, say, warn

if TYPE_CHECKING:
    from sasa_train.report.jobs import Job
    from sasa_train.report.rows import Report

EPILOG = """examples:
  sasa-report outputs/SWEEP                          report.html, table.md, .csv, .json, plots: in outputs/SWEEP/report/
  sasa-report outputs/SWEEP --reference kernel_size=7
  sasa-report outputs/RUN_1 outputs/RUN_2 --out compared
  sasa-report outputs                                every run in the folder, as sasa-train -m leaves them
  sasa-report outputs/RUN data.root=/elsewhere       one run: its report.html also shows classes and attention

A row is what differs in its seed alone: mean top1 of the last epoch with the 95 % confidence interval over seeds, and
the difference to a reference row, paired by seed. Jobs that are not done are listed below the table.
Exit codes: 0 done, 2 refused."""


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    parser = build_parser()
    try:
        options = parser.parse_intermixed_args(arguments)
    except SystemExit as stop:  # after --help or argparse's own refusal
        return int(stop.code or 0)
    from sasa_train.config.overrides import split_overrides

    sources, options.overrides = split_overrides(options.sources)
    options.sources = [Path(source) for source in sources]
    try:
        if not sources:
            raise ConfigError("no sweep or run folder is given")
        report(options)
    except ConfigError as error:
        return fail(error)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sasa-report",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sources", nargs="+", metavar="SWEEP_OR_RUN", help="sweep or run folders")
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
    parser.add_argument("--quick", action="store_true", help="of a run: without what needs its model and images")
    parser.add_argument(
        "--num-images",
        type=positive,
        default=10_000,
        metavar="N",
        help="of a run: val images, at most, of the figures by class (%(default)s)",
    )
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1 on")
    return int(text)


def report(options: argparse.Namespace) -> None:
    """Read, compute, write, print.

    Raises:
        ConfigError: what cannot be read or written, or is not there.
    """
    from sasa_train.files import write_outputs
    from sasa_train.report.jobs import find_jobs
    from sasa_train.report.page import PAGE, the_run
    from sasa_train.report.pictures import NO_PLOTS
    from sasa_train.report.rows import build_report
    from sasa_train.report.tables import as_csv, as_json, markdown
    from sasa_train.terminal import printable_lines

    folder = output_folder(options)
    found = find_jobs(options.sources)
    table = options.paper_table or (min(found.paper_tables) if len(found.paper_tables) == 1 else None)
    built = build_report(found.jobs, table, options.reference, found.commands)
    job = the_run(built)
    check_overrides(options.overrides, job)
    text = printable_lines(markdown(built))
    files = {"table.md": text.encode(), "table.csv": as_csv(built).encode(), "table.json": as_json(built).encode()}
    charts: dict[str, bytes] = {}
    if has_matplotlib():
        from sasa_train.report.charts import draw_charts

        charts = draw_charts(built)
    else:
        warn(NO_PLOTS)
    write_outputs(folder, files | charts)  # before what takes long
    say(text)
    page = sweep_page_of(built, options, charts, folder) if job is None else run_page_of(built, job, options, folder)
    write_outputs(folder, {PAGE: page.encode()})
    say(f"{folder}: {', '.join([*files, *charts, PAGE])}")


def check_overrides(overrides: list[str], job: "Job | None") -> None:
    """Refuse them before any work; they are for what is drawn of one run's model."""
    from sasa_train.config.overrides import check_override_keys, split_weights
    from sasa_train.config.saved import load_config_file

    _, knobs = split_weights(overrides)
    check_override_keys(knobs)
    if overrides and job is None:
        raise ConfigError(f"{' '.join(overrides)}: is for the pictures of one run's model; several are given")
    if job is not None and job.run_dir is not None:
        load_config_file(job.run_dir / "config.yaml", knobs)


def sweep_page_of(report: "Report", options: argparse.Namespace, charts: dict[str, bytes], folder: Path) -> str:
    from sasa_train.report.page import sweep_page
    from sasa_train.report.pictures import NO_PLOTS, of_charts

    why_not = "No job is done, so there is nothing to draw." if has_matplotlib() else NO_PLOTS
    return sweep_page(report, options.sources, of_charts(charts), [] if charts else [why_not], folder)


def run_page_of(report: "Report", job: "Job", options: argparse.Namespace, folder: Path) -> str:
    """With what its model does on its data, unless --quick; what cannot be drawn is also said on stderr."""
    from sasa_train.report.page import run_page
    from sasa_train.report.run_pictures import curves_section, model_sections
    from sasa_train.terminal import printable_lines

    sections = [curves_section(job)]
    if not options.quick:
        assert job.run_dir is not None
        sections += model_sections(job.run_dir, options.overrides, options.num_images)
    for section in sections:
        for text in section.missing:
            warn(printable_lines(f"{section.title}: {text}"))
    return run_page(report, job, sections, folder)


def output_folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return options.out
    if len(options.sources) > 1:
        raise ConfigError(f"{len(options.sources)} folders are given: say with --out DIR where to write")
    return options.sources[0] / "report"


if __name__ == "__main__":
    main()
