"""What a run's folder says about the run, as names and texts for the page; its files may be anybody's, and damaged."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sasa_train.config.compose import compose_config
from sasa_train.config.derived import resolved_image_size
from sasa_train.config.keys import MODEL_KEYS, TrainConfig, flatten, key_table
from sasa_train.config.overrides import as_written
from sasa_train.paper import Row as PaperRow
from sasa_train.report.beside_paper import differing_dials, nearest_row
from sasa_train.report.jobs import Job
from sasa_train.report.rows import Row
from sasa_train.report.tables import HELD_OUT_TABLES, split_of
from sasa_train.terminal import duration

MAX_LINES = 10  # of a file that is quoted
ARTEFACTS = (
    ("config.yaml", "the resolved config"),
    ("metrics.jsonl", "one JSON object a line: loss, top1, lr, speed"),
    ("run.json", "command, commit, versions, hardware, status"),
    ("checkpoints/*.pt", "checkpoint"),
    ("tensorboard", "curves: tensorboard --logdir on the folder"),
    ("augmented.png", "the first batch as the model saw it"),
    ("changes-*.diff", "what was not committed when it was started"),
    ("unreadable.txt", "images that could not be read"),
    ("nonfinite.txt", "where a loss that was not finite came from"),
    ("profile", "a trace and the top operators"),
)


@dataclass
class Artefact:
    """`href` leads from the page to the file; `size` in words, empty for a folder."""

    name: str
    href: str
    size: str
    meaning: str


def headline(job: Job) -> list[tuple[str, str, str]]:
    """Name, figure and what to know about it."""
    if not job.val:
        return []
    last, best = job.val[-1], max(job.val, key=lambda row: row["top1"])
    assert job.config is not None
    use = "the figure to publish" if job.state == "done" else "the run is not finished"
    of_last = f"after epoch {last.get('epoch')} of {job.config.trainer.epochs}; {use}"
    of_best = f"after epoch {best.get('epoch')}; chosen on val, so it flatters"
    return [
        ("top1, last epoch", f"{last['top1']:.2f} %", of_last),
        ("top1, best epoch", f"{best['top1']:.2f} %", of_best),
    ]


def key_facts(job: Job, row: Row) -> list[tuple[str, str]]:
    """One line each; what the folder does not tell is left out."""
    config, info = job.config, job.info
    assert config is not None
    last = job.val[-1] if job.val else {}
    found = {
        "model": _model(config),
        "val": split_of(config),
        "val loss": _figure(last.get("loss"), "{:.4f}"),
        "top5, last epoch": _figure(last.get("top5"), "{:.2f} %"),
        "parameters": _figure(row.params, "{:,}"),
        "GFLOPs": _figure(row.flops and row.flops / 1e9, "{:.3g}, one image, forward"),
        "speed": _figure(job.images_per_sec, "{:,.0f} images/s in training, median of the train rows"),
        "training time": "" if job.seconds is None else f"{duration(job.seconds)}, without evaluations",
        "device": _device(job),
        "batch": f"{config.trainer.global_batch_size} images a step",
        "seed": str(config.seed),
        "status": job.state,
        "restarts": str(max(len(records(info, "starts")) - 1, 0) or ""),
    }
    return [(name, text) for name, text in found.items() if text]


def _figure(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def _model(config: TrainConfig) -> str:
    dials = {dial: getattr(config.model, dial) for dial in MODEL_KEYS}
    return ", ".join(
        [config.model.name] + [f"{key}={as_written(value)}" for key, value in dials.items() if value is not None]
    )


def _device(job: Job) -> str:
    assert job.config is not None
    info, trainer = job.info, job.config.trainer
    if not info:
        return ""
    gpu = info.get("gpu") if trainer.device != "cpu" else None
    name = str(gpu) if gpu else f"CPU, threads: {info.get('threads')}"
    num_processes = info.get("world_size", 1)
    return f"{name}, {trainer.precision}" + (f", {num_processes} processes" if num_processes != 1 else "")


def records(info: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Those of the list under `key` that are what we write."""
    found = info.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def environment(job: Job) -> list[tuple[str, str]]:
    """Machine, code and packages."""
    info = job.info
    names = {
        "started": "started", "host": "host", "platform": "platform", "processors": "processors",
        "threads": "threads", "world_size": "processes", "gpu": "GPU", "directory": "directory", "commit": "commit",
    }  # fmt: skip
    rows = [(name, str(info[key])) for key, name in names.items() if info.get(key) is not None]
    if "dirty" in info:
        rows.append(("uncommitted changes", "yes, in the diff among the files" if info["dirty"] else "none"))
    if isinstance(info.get("not_in_git"), list) and info["not_in_git"]:
        rows.append(("files not in git", str(len(info["not_in_git"]))))
    versions = info.get("versions")
    if isinstance(versions, dict):
        rows += [(str(name), str(version)) for name, version in versions.items() if version is not None]
    return rows


def changed_knobs(config: TrainConfig) -> list[tuple[str, str, str, str]]:
    """Key, value, default and meaning of each knob that is not at its default."""
    defaults, meanings = flatten(compose_config([])), key_table()
    return [
        (key, as_written(value), as_written(defaults[key]), meanings[key].metadata["help"])
        for key, value in flatten(config).items()
        if value != defaults[key]
    ]


def artefacts(run_dir: Path, folder: Path) -> list[Artefact]:
    """What is in the run's folder, linked from a page in `folder`."""
    found = [(path, meaning) for pattern, meaning in ARTEFACTS for path in sorted(run_dir.glob(pattern))]
    return [
        Artefact(str(path.relative_to(run_dir)) + "/" * path.is_dir(), href(path, folder), _size(path), meaning)
        for path, meaning in found
        if path.exists()
    ]


def href(path: Path, folder: Path) -> str:
    """From a page in `folder`; escaped, so that no name is read as an address elsewhere."""
    return quote(os.fsencode(os.path.relpath(path, folder))) + "/" * path.is_dir()


def _size(path: Path) -> str:
    if path.is_dir():
        return ""
    size = path.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} KB"


def warnings(job: Job) -> Iterator[tuple[str, list[str]]]:
    """What must be known before a figure is believed: a sentence, and lines quoted."""
    run_dir, config = job.run_dir, job.config
    assert run_dir is not None and config is not None
    if job.state != "done":
        epoch = job.val[-1].get("epoch") if job.val else 0
        so_far = f"evaluated up to epoch {epoch} of {config.trainer.epochs}"
        text = f"The run is not finished ({job.state}): {so_far}. To go on with it: sasa-train resume={run_dir}"
        yield text, job.reason.splitlines()[:MAX_LINES]
    if lines := _lines(run_dir / "unreadable.txt"):
        yield f"{len(lines)} images could not be read and were replaced or left out.", _some(lines)
    if lines := _lines(run_dir / "nonfinite.txt"):
        yield "A loss was not finite.", _some(lines)
    if damaged := sorted(path.name for path in run_dir.glob("checkpoints/*.damaged")):
        yield f"Damaged checkpoints were found and put aside: {', '.join(damaged)}.", []
    if config.data.name == "digits":
        yield "The digits prove that the machinery works, no more: a map of 8 pixels is one window.", []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _some(lines: list[str]) -> list[str]:
    left_out = len(lines) - MAX_LINES
    return lines if left_out <= 0 else [*lines[:MAX_LINES], f"and {left_out} more lines in the file"]


@dataclass
class Beside:
    """The paper's row that a run is set beside: `differing` names dials as "width=0.25 (the paper's 1.0)"."""

    paper: PaperRow
    differing: str
    is_same_data: bool
    held_out: str  # a sentence, or nothing


def beside_paper(config: TrainConfig, row: Row) -> Beside | None:
    """Of the report's table where that has one, else the row whose model is nearest; None for other models."""
    paper = row.paper or nearest_row(config)
    if paper is None:
        return None
    differing = ", ".join(
        f"{key}={as_written(ours)} (the paper's {as_written(papers)})"
        for key, (papers, ours) in differing_dials(paper, config).items()
        if key != "family"  # a name for what stem and stage_ops say
    )
    is_same_data = config.data.name == "imagenet" and resolved_image_size(config.data) == 224
    is_held_out, ours_is = paper.table in HELD_OUT_TABLES, config.data.holdout_fraction > 0
    held_out = ""
    if is_held_out and not ours_is:
        held_out = "The paper's top1 of this table is on 4 % held out of train, ours is not."
    elif ours_is and not is_held_out:
        held_out = "Ours is on images held out of train, the paper's top1 of this table is not."
    return Beside(paper, differing, is_same_data, held_out)
