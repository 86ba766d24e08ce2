"""What was reached, in a sentence: against chance, and against the other runs or rows."""

import functools
from pathlib import Path

from sasa_train.config.derived import expected_num_classes
from sasa_train.config.keys import TrainConfig
from sasa_train.config.places import places, real
from sasa_train.refusal import ConfigError
from sasa_train.report.advice import advice
from sasa_train.report.intervals import exactness, half_width
from sasa_train.report.jobs import Job, find_jobs
from sasa_train.report.rows import Report, Row, paired_difference
from sasa_train.report.run_list import group_by_data
from sasa_train.runs.chance import Chance


def chance_of(jobs: list[Job]) -> Chance | None:
    """Return chance on the jobs' val images, counted in the first readable checkpoint; None if it is unknown.

    It is about top1, and None where another figure is shown.
    """
    if any(job.figure != "top1" for job in jobs):
        return None
    for job in jobs:
        counts = () if job.run_dir is None else _num_val_images(job.run_dir)
        if sum(counts):
            return Chance.among(counts)
    sizes = {expected_num_classes(job.config) for job in jobs if job.config is not None}
    num_classes = sizes.pop() if len(sizes) == 1 else None
    return Chance(100 / num_classes, num_classes) if num_classes else None


@functools.cache  # reading a large checkpoint takes seconds
def _num_val_images(run_dir: Path) -> tuple[int, ...]:
    """Return the number of val images of each class by the run's last checkpoint; () if it cannot be read."""
    from sasa_train.runs.checkpoint import CheckpointError, load_checkpoint

    try:
        classes = load_checkpoint(run_dir / "checkpoints/last.pt")["fingerprint"]["val"]["classes"]
    except CheckpointError:
        return ()
    return tuple(entry["num_images"] for entry in classes)


def val_note(jobs: list[Job]) -> str:
    """Say how exact the highest top1 is on so few val images; "" if the data sets differ or the number is unknown."""
    chance = chance_of(jobs) if len(list(group_by_data(jobs))) == 1 else None
    if chance is None or not chance.num_images:
        return ""
    return exactness(max(job.last for job in jobs), chance.num_images)


def sentences(job: Job, chance: Chance | None) -> list[str]:
    """Return what to say first of a run: what it reached, how exact that is, and what to do next."""
    accuracy = ""
    if job.val and chance is not None and chance.num_images:
        points = half_width(job.last, chance.num_images)
        accuracy = f"{chance.num_images:,} val images: top1 is accurate to about ± {points:.2g} points."
    return [text for text in (of_run(job, chance), accuracy, advice(job, chance)) if text]


def of_run(job: Job, chance: Chance | None) -> str:
    """Say what a run reached against chance and the best run on the same images in its folder; "" without a val row."""
    if not job.val:
        return ""
    assert job.config is not None
    epochs = f"after epoch {job.val[-1]['epoch']} of {job.config.trainer.epochs}"
    return f"{job.figure} is {job.last:.2f} % {epochs}{_against(job.last, chance)}{_in_folder(job)}."


def _against(top1: float, chance: Chance | None) -> str:
    if chance is None:
        return ""
    if chance.explains(top1):
        return f", not above {chance}"
    return f", {top1 / chance.top1:.1f} times {chance}"


def _in_folder(job: Job) -> str:
    assert job.run_dir is not None
    folder = job.run_dir.resolve().parent
    try:
        jobs = find_jobs([folder]).jobs
    except (ConfigError, OSError):  # a damaged ledger or an unreadable folder: the page is about this run alone
        return ""
    # The last epoch decides, so a run that has not finished is not judged.
    others = [other for other in jobs if other.val and other.state == "done" and _same_images(other, job)]
    others = [other for other in others if other.has(job.figure)]
    for other in others:
        other.figure = job.figure
    best = max(others, key=lambda other: other.last, default=None)
    if best is None or (len(others) == 1 and job.state == "done"):
        return ""
    if len(others) == 1:
        return f"; the only finished run on these images in {folder.name}, {best.name}, has {best.last:.2f} %"
    where = f"highest of the {len(others)} finished runs on these images in {folder.name}"
    if job.state == "done" and best.last <= job.last:
        return f"; it is the {where}"
    return f"; the {where} is {best.name} with {best.last:.2f} %"


def _same_images(one: Job, other: Job) -> bool:
    return one.config is not None and other.config is not None and _images(one.config) == _images(other.config)


def _images(config: TrainConfig) -> tuple:
    data = config.data
    found = {key: real(path) for key, path in places(data).items()}
    named = (data.target, data.dataset, str(data.args), data.columns)
    return data.name, found, *named, data.holdout_fraction, data.max_val_images


def caution(top1: float | None, chance: Chance | None) -> str:
    """Warn of a top1 that guessing would reach as well; "" if it is higher or unknown."""
    if top1 is None or chance is None or not chance.explains(top1):
        return ""
    of_images = f" on {chance.num_images:,} images" if chance.num_images else ""
    return (
        f"top1 {top1:.2f} %{of_images} is not above {chance}: the model has not learned to tell the classes apart, and "
        "figures of its attention and classes show noise. Check the labels, the learning rate and the number of steps."
    )


def of_rows(report: Report) -> tuple[list[str], list[str], dict[int, str]]:
    """Return, with one entry per data set, its verdict and its cautions, and the mark of each highest row's number."""
    verdicts, cautions, marks = [], [], dict[int, str]()
    numbers = {id(job): number for number, row in enumerate(report.rows, 1) for job in row.jobs.values()}
    for data, jobs in group_by_data(report.all_jobs):
        chance = chance_of(jobs)
        found = [(number, report.rows[number - 1]) for number in dict.fromkeys(numbers[id(job)] for job in jobs)]
        found.sort(key=lambda pair: -_mean(pair[1]))
        verdicts.append(_of_rows(data, found, chance))
        if len(found) > 1:
            marks[found[0][0]] = "best row" if _leads(found) else "highest"
        at_chance = sorted(number for number, row in found if chance is not None and chance.explains(_mean(row)))
        if at_chance:
            rows = "Row" if len(at_chance) == 1 else "Rows"
            cautions.append(f"{rows} {', '.join(map(str, at_chance))} on {data}: top1 is not above {chance}.")
    return verdicts, cautions, marks


def _of_rows(data: str, found: list[tuple[int, Row]], chance: Chance | None) -> str:
    """Describe the best of the rows on one data set; `found` is sorted, the best first."""
    number, row = found[0]
    figure = next(iter(row.jobs.values())).figure
    how = f"mean of {len(row.jobs)} seeds" if len(row.jobs) > 1 else "one seed"
    reached = f"{_mean(row):.2f} % ({how}){_against(_mean(row), chance)}."
    if len(found) == 1:
        return f"On {data}, {figure} is {reached}"
    which = "best" if _leads(found) else "highest"
    text = f"The {which} of {len(found)} rows on {data} is row {number}, {row.label}, with {figure} {reached}"
    if _mean(row) == _mean(found[1][1]):
        return f"{text} It is equal to the next, row {found[1][0]}."
    lead = paired_difference(row, found[1][1])
    if lead is None or not lead.is_shown:
        text += f" There are too few seeds to tell whether it is better than the next, row {found[1][0]}."
        return f"{text} Its {figure} is optimistic, because it was chosen among {len(found)}."
    clear = "and the interval over seeds excludes 0" if lead.excludes_zero else "which chance in the seeds may explain"
    return f"{text} It is {lead.mean:.2f} points above the next, row {found[1][0]}, {clear} (± {lead.half_width:.2f})."


def _leads(found: list[tuple[int, Row]]) -> bool:
    """Whether chance in the seeds does not explain that the first row is above the second."""
    lead = paired_difference(found[0][1], found[1][1])
    return lead is not None and lead.is_shown and bool(lead.excludes_zero) and lead.mean > 0


def _mean(row: Row) -> float:
    assert row.last is not None  # only rows with jobs are judged
    return row.last.mean
