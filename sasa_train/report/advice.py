"""What a run's curves say in a sentence: whether the model memorises its train images, and what would help next."""

from statistics import fmean

from sasa_train.report.jobs import Job
from sasa_train.runs.chance import Chance, remedy
from sasa_train.runs.metrics import read_metrics

RISEN = 1.1  # times its lowest: a smaller rise of the val loss may be noise
LATE = 3  # evaluations whose mean val loss is compared with the lowest
GAP = 25  # points of top1 that train is above val; augmentation lowers the train top1, so the true gap is larger
ALIKE = 5  # points of top1: a smaller gap between train and val is none
HIGHER = 1  # points of top1 that one of the last evaluations is above all before; no less than its standard error
FLAT = 0.02  # relative to the lowest val loss: a smaller fall is none
AT_THE_END = 10  # the last tenth of the evaluations


def advice(job: Job, chance: Chance | None = None) -> str:
    """State top1 of train and val, what the curves show, and what helps next; "" without an evaluation."""
    if job.run_dir is None or job.state == "damaged" or not job.val:
        return ""
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    top1 = [row["top1"] for row in train if row["epoch"] == val[-1]["epoch"] and row.get("top1") is not None]
    of_train, of_val = sum(top1) / len(top1) if top1 else None, val[-1]["top1"]
    numbers = f"top1 of the last epoch: val {of_val:.1f} %"
    if of_train is not None:
        numbers = f"top1 of the last epoch: train {of_train:.1f} %, val {of_val:.1f} %"
    losses = [row.get("loss") for row in val]
    train, val = ([row for row in part if row.get("loss") is not None] for part in (train, val))
    if rise := _val_loss_rises(train, val):
        return f"{numbers}. {rise}"
    gap = 0.0 if of_train is None else of_train - of_val
    if gap >= GAP:
        return f"{numbers}: the net memorises the train images; more augmentation, a smaller net or more images help."
    if chance is not None and chance.explains(of_val):
        assert job.config is not None
        what = remedy(job.config.optimizer.lr, job.val[-1]["step"], losses, chance.num_classes)
        return f"{numbers}: it has not learned yet; {what}."
    if of_train is not None:
        numbers += f": a gap of {gap:.0f} points, no clear memorising" if gap > ALIKE else ", no sign of memorising"
    noise = max(HIGHER, chance.error(of_val) if chance is not None else 0.0)
    return f"{numbers}; {_what_helps(job, val, noise, is_alike=of_train is not None and gap <= ALIKE)}."


def _what_helps(job: Job, val: list[dict], noise: float, is_alike: bool) -> str:
    """Say what helps a model that does not memorise: more epochs, a larger net, or more images.

    noise: points of top1 that two evaluations may differ by chance.
    """
    assert job.config is not None
    ends = (name for name in ("max_pflops", "max_steps") if getattr(job.config.trainer, name) is not None)
    key = f"trainer.{next(ends, 'epochs')}"
    if len(val) < LATE:
        return f"{len(val)} evaluations with a loss are too few to say what helps: more epochs ({key}=...) tell"
    if job.state != "done":
        return "the run has not ended, so what helps next is not known yet"
    # A single evaluation may be low by chance, so that each is averaged with its neighbours.
    losses = [fmean(row["loss"] for row in val[max(0, i - 1) : i + 2]) for i in range(len(val))]
    settled = next(i for i, loss in enumerate(losses) if loss <= (1 + FLAT) * min(losses))
    since = val[settled]["epoch"]
    if settled >= len(val) - max(1, len(val) // AT_THE_END):
        return f"val loss still falls at the end: more epochs would help ({key}=...)"
    trend = f"val loss has hardly fallen since epoch {since}"
    lowest = min(val, key=lambda row: row["loss"])
    if sum(row["loss"] for row in val[-LATE:]) / LATE > (1 + FLAT) * lowest["loss"]:
        trend = f"val loss has risen a little since epoch {lowest['epoch']}"
    if max(row["top1"] for row in val[-LATE:]) > max([row["top1"] for row in val[:-LATE]], default=100) + noise:
        return f"val top1 still rises, though {trend}: more epochs may help"
    if is_alike:
        return f"train and val are alike: a larger net or more epochs ({key}=...) may help"
    pretrained = "" if job.config.model.pretrained else " or existing weights (docs/finetune.md)"
    return f"{trend}: more images{pretrained} would help more than more epochs"


def _val_loss_rises(train: list[dict], val: list[dict]) -> str:
    """Say from which epoch on the val loss rose clearly while the train loss fell."""
    if not val:
        return ""
    lowest = min(val, key=lambda row: row["loss"])
    late = [row["loss"] for row in val if row["step"] > lowest["step"]][-LATE:]
    before = [row["loss"] for row in train if row["step"] <= lowest["step"]]
    after = [row["loss"] for row in train if row["step"] > lowest["step"]]
    if len(late) < LATE or not before or not after or after[-1] >= before[-1]:
        return ""
    if sum(late) / LATE < RISEN * lowest["loss"]:
        return ""
    return (
        f"The val loss was lowest after epoch {lowest['epoch']} ({lowest['loss']:.3f}) and rose to {late[-1]:.3f}, "
        f"while the train loss fell from {before[-1]:.3f} to {after[-1]:.3f}: since then the model memorises its train "
        "images. More augmentation, more images or fewer epochs may help."
    )
