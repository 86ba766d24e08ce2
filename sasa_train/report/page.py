"""The report as one self-contained HTML page: all facts about a single run, or a table of several runs.

The names of runs, classes and files are untrusted, so jinja2 escapes everything that is inserted into the page, and
`printable_lines` escapes characters that no page can display.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from sasa_train import __version__
from sasa_train.config.derived import in_pixels, resolved_size
from sasa_train.config.saved import to_yaml
from sasa_train.extras import why_not
from sasa_train.machine import now
from sasa_train.report import facts, verdict
from sasa_train.report.jobs import Job
from sasa_train.report.rows import Report, Row
from sasa_train.report.run_list import best_of, columns_of, group_by_data, mark_of
from sasa_train.report.tables import cells, not_counted, notes, title
from sasa_train.terminal import printable_lines, progress_bar
from sasa_train.visualize.names import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
MAX_NAMES = 3  # maximum number of folders named in a title
MAX_BYTES = 300_000  # maximum size of a lossless picture
COMMANDS = (("command", "Command"), ("reproduce", "The same in full"))
OF_A_START = ("started", "step", "commit", "host", "world_size", "command")


@dataclass
class Picture:
    """A picture: `alt` states its kind, `caption` describes it, and `size` is in CSS pixels (96 per inch)."""

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def size(self) -> tuple[int, int]:
        from sasa_train.figures import DPI  # requires matplotlib, as does every picture

        width, height = Image.open(io.BytesIO(self.png)).size
        return width * 96 // DPI, height * 96 // DPI

    @property
    def webp(self) -> str:
        """Base64-encoded WebP: lossless (a third of a PNG chart's size), or lossy if that would exceed MAX_BYTES."""
        image, file, small = Image.open(io.BytesIO(self.png)).convert("RGB"), io.BytesIO(), io.BytesIO()
        image.save(file, "webp", lossless=True)
        if file.tell() > MAX_BYTES:
            image.save(small, "webp", quality=90)
        return base64.b64encode(small.getvalue() or file.getvalue()).decode()


@dataclass
class Section:
    """Pictures of one kind; `missing` explains why others could not be drawn, and `rows` is the table shown below."""

    id: str
    title: str
    note: str = ""
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    rows_title: str = ""

    def add(self, drawn: "Iterable[tuple[str, Figure, str]]", number: int | None = None) -> None:
        """Add figures drawn by sasa-visualize, with their captions; `number` is how many there will be."""
        from sasa_train.figures import rendered

        what = self.title.partition(" ")[0].lower()
        for name, figure, caption in progress_bar(drawn, total=number, desc=f"drawing {what}", unit="figure"):
            alt = FIGURES[name][0].upper() + FIGURES[name][1:]
            self.pictures.append(Picture(name, rendered(figure), alt, caption))

    def can_draw(self) -> bool:
        """True if matplotlib is installed; otherwise the section says that it is missing."""
        reason = why_not("A plot", "plots")
        self.missing += [reason] if reason else []
        return reason is None


def the_run(report: Report) -> Job | None:
    """Return the run of a single-run report, or None if there are several jobs or the job has no folder."""
    jobs = report.all_jobs + [job for job, _ in report.not_counted]
    return jobs[0] if len(jobs) == 1 and jobs[0].run_dir is not None and jobs[0].config is not None else None


def run_page(
    report: Report, job: Job, sections: list[Section], folder: Path, chance: verdict.Chance | None, said: list[str]
) -> str:
    """Render the page of a single run, which will be written to `folder`; `said` are its first sentences."""
    (row,) = report.rows
    config, run_dir = job.config, job.run_dir
    assert config is not None and run_dir is not None
    caution = verdict.caution(job.last if job.val else None, chance)
    beside = facts.beside_paper(job, row)
    return _render(
        "run.html.j2",
        title=job.name,
        contents=[
            ("result", "Result"), *([("paper", "Beside the paper")] if beside else []),
            *((part.id, part.title) for part in sections),
            ("config", "Config"), ("environment", "Environment"), ("files", "Files"),
        ],
        model=config.model.title,
        data=f"{config.data.title} at {in_pixels(resolved_size(config.data))}",
        headline=facts.headline(job),
        verdicts=said,
        warnings=[*([(caution, [])] if caution else []), *facts.warnings(job)],
        facts=facts.key_facts(job, row),
        beside=beside,
        sections=sections,
        keys=facts.changed_keys(config),
        yaml=to_yaml(config),
        commands=[(name, str(job.info[key])) for key, name in COMMANDS if job.info.get(key)],
        environment=facts.environment(job),
        starts=[{key: str(start.get(key)) for key in OF_A_START} for start in facts.starts(job.info)],
        artefacts=facts.artefacts(run_dir, folder),
    )  # fmt: skip


def sweep_page(report: Report, sources: list[Path], plots: Section, folder: Path) -> str:
    """Render the page for several runs."""
    verdicts, cautions, marks = verdict.of_rows(report)
    names = [source.resolve().name for source in sources]
    left_out = len(names) - MAX_NAMES
    listed = not_counted(report)
    contents = [("runs", "Runs"), ("table", "Table"), (plots.id, plots.title), ("rows", "Rows")]
    contents[3:3] = [("not-counted", "Jobs that are not in the figures")] if listed else []
    contents += [("commands", "Commands")] if report.commands else []
    return _render(
        "sweep.html.j2",
        figure=report.figure,
        title=", ".join(names[:MAX_NAMES]) + (f" and {left_out} more" if left_out > 0 else ""),
        what=title(report),
        verdicts=verdicts,
        cautions=cautions,
        marks=marks,
        runs=_listed(report, folder),
        contents=contents,
        num_runs=len(report.all_jobs),
        num_rows=len(report.rows),
        table=[cells(report, i, row) for i, row in enumerate(report.rows, 1)],
        caption="Means over seeds" + " with 95 % confidence intervals" * report.has_intervals,
        notes=notes(report),
        plots=plots,
        not_counted=listed,
        rows=[_described(row, i, folder) for i, row in enumerate(report.rows, 1)],
        commands=report.commands,
    )


def _listed(report: Report, folder: Path) -> list[dict[str, Any]]:
    """Return the tables of `sasa-report --list`, one for each data set, with links to the runs."""
    jobs = report.all_jobs + [job for job, _ in report.not_counted]
    return [
        {
            "data": data,
            "names": [column[0] for column in columns],
            "jobs": [
                {
                    "name": job.name,
                    "href": facts.href(job.run_dir, folder) if job.run_dir else "",
                    "cells": cells,
                    "mark": f"{mark_of(group)} run" if job is best_of(group) else "",
                }
                for job, *cells in zip(group, *(column[1:] for column in columns), strict=True)
            ],
        }
        for data, group in group_by_data(jobs)
        for columns in [columns_of(group)]
    ]


def _described(row: Row, number: int, folder: Path) -> dict[str, Any]:
    """Return a row's title, its jobs with links to their runs, and the full command of the first run."""
    jobs = [job for _, job in sorted(row.jobs.items())]
    reached = f"{jobs[0].figure} {row.last.mean:.2f}" if row.last else "no result"
    return {
        "title": f"{number}. {row.label}: {reached}, {len(jobs)} of {row.num_jobs} seeds",
        "runs": [(job, *_links(job, folder)) for job in jobs],
        "command": str(jobs[0].info.get("reproduce") or "") if jobs else "",
    }


def _links(job: Job, folder: Path) -> tuple[str, str]:
    """Return links to a run's folder and to its own page (an empty string if it has none)."""
    assert job.run_dir is not None
    page = job.run_dir / "report" / PAGE
    return facts.href(job.run_dir, folder), facts.href(page, folder) if page.is_file() else ""


def _render(template: str, **values: Any) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(version=__version__, written=now(), **values)


def _shown(value: Any) -> Any:
    return printable_lines(value) if type(value) is str else value  # Markup comes only from the templates
