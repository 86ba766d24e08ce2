"""The report as one HTML page that needs nothing but itself: of a run all that its folder tells, of several the table.

Names of runs, classes and files come from disks, so jinja2 escapes whatever enters the page, and `printable_lines` what
no page can show.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sasa_train import __version__
from sasa_train.config.derived import resolved_image_size
from sasa_train.config.saved import to_yaml
from sasa_train.machine import now
from sasa_train.report.jobs import Job
from sasa_train.report.pictures import Picture, Section
from sasa_train.report.rows import Report, Row
from sasa_train.report.run_facts import (
    Beside,
    artefacts,
    beside_paper,
    changed_knobs,
    environment,
    headline,
    href,
    key_facts,
    records,
    warnings,
)
from sasa_train.report.tables import cells, not_counted, notes, title
from sasa_train.terminal import printable_lines

PAGE = "report.html"
MAX_NAMES = 3  # of folders in a title
COMMANDS = (("command", "Command"), ("reproduce", "The same in full"))
OF_A_START = ("started", "step", "commit", "host", "world_size", "command")


def the_run(report: Report) -> Job | None:
    """The one run that the report is about, or None where it is about several jobs, or about one without a folder."""
    jobs = report.all_jobs + [job for job, _ in report.not_counted]
    return jobs[0] if len(jobs) == 1 and jobs[0].run_dir is not None and jobs[0].config is not None else None


def run_page(report: Report, job: Job, sections: list[Section], folder: Path) -> str:
    """The page of one run; `folder` is where it will lie."""
    (row,) = report.rows
    config, run_dir = job.config, job.run_dir
    assert config is not None and run_dir is not None
    beside = beside_paper(config, row)
    return _render(
        "run.html.j2",
        title=job.name,
        contents=[
            ("result", "Result"), ("paper", "Beside the paper"), *((part.id, part.title) for part in sections),
            ("config", "Config"), ("environment", "Environment"), ("files", "Files"),
        ],
        model=config.model.name,
        data=f"{config.data.name} at {resolved_image_size(config.data)} pixels",
        headline=headline(job),
        warnings=list(warnings(job)),
        facts=key_facts(job, row),
        beside=beside,
        beside_rows=_beside_rows(beside, job, row) if beside else [],
        sections=sections,
        knobs=changed_knobs(config),
        yaml=to_yaml(config),
        commands=[(name, str(job.info[key])) for key, name in COMMANDS if job.info.get(key)],
        environment=environment(job),
        starts=[{key: str(start.get(key)) for key in OF_A_START} for start in records(job.info, "starts")],
        artefacts=artefacts(run_dir, folder),
    )  # fmt: skip


def _beside_rows(beside: Beside, job: Job, row: Row) -> list[dict[str, str]]:
    paper, config = beside.paper, job.config
    assert config is not None
    return [
        {
            "whose": "ours",
            "model": config.model.name,
            "data": f"{config.data.name} at {resolved_image_size(config.data)}",
            "top1, last epoch": f"{job.last:.2f}" if job.val else "-",
            "M params": "-" if row.params is None else f"{row.params / 1e6:.2f}",
            "GFLOPs": "-" if row.flops is None else f"{row.flops / 1e9:.3g}",
        },
        {
            "whose": "the paper's",
            "model": f"Table {paper.table}: {paper.label}",
            "data": "ImageNet at 224",
            "top1, last epoch": f"{paper.top1:.1f}",
            "M params": f"{paper.mparams:.1f}" if paper.mparams else "-",
            "GFLOPs": f"{paper.gflops:.1f}",
        },
    ]


def sweep_page(report: Report, sources: list[Path], pictures: list[Picture], missing: list[str], folder: Path) -> str:
    """The page of several runs; `missing` says which plots are not there and why."""
    names = [source.resolve().name for source in sources]
    left_out = len(names) - MAX_NAMES
    num_runs = len(report.all_jobs)
    listed = not_counted(report)
    contents = {
        "table": "Table",
        "plots": "Plots",
        "not-counted": "Jobs that are not in the figures" if listed else "",
        "rows": "Rows",
        "commands": "Commands" if report.commands else "",
    }
    return _render(
        "sweep.html.j2",
        title=", ".join(names[:MAX_NAMES]) + (f" and {left_out} more" if left_out > 0 else ""),
        what=title(report),
        contents=[(id, name) for id, name in contents.items() if name],
        num_runs=num_runs,
        num_rows=len(report.rows),
        table=[cells(report, i, row) for i, row in enumerate(report.rows, 1)],
        notes=notes(report),
        pictures=pictures,
        missing=missing,
        not_counted=listed,
        rows=[_described(row, i, folder) for i, row in enumerate(report.rows, 1)],
        commands=report.commands,
    )


def _described(row: Row, number: int, folder: Path) -> dict[str, Any]:
    """A row's runs with links, and the command in full of its first."""
    jobs = [job for _, job in sorted(row.jobs.items())]
    top1 = f"top1 {row.top1.mean:.2f}" if row.top1 else "no top1"
    return {
        "title": f"{number}. {row.label}: {top1}, {len(jobs)} of {row.num_jobs} seeds",
        "runs": [_linked(job, folder) for job in jobs],
        "command": str(jobs[0].info.get("reproduce") or "") if jobs else "",
    }


def _linked(job: Job, folder: Path) -> dict[str, str]:
    assert job.run_dir is not None
    page = job.run_dir / "report" / PAGE
    return {
        "name": job.name,
        "href": href(job.run_dir, folder),
        "seed": str(job.seed),
        "last": f"{job.last:.2f}",
        "best": f"{job.best:.2f}",
        "page": href(page, folder) if page.is_file() else "",
    }


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
    return printable_lines(value) if type(value) is str else value  # Markup is the templates' own
