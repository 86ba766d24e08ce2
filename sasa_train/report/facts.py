"""Facts from a run folder, as labelled strings for the page; the files are untrusted and may be damaged."""

import os
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sasa_train.config.compose import compose_config
from sasa_train.config.derived import has_top5, in_pixels, resolved_size
from sasa_train.config.keys import MODEL_KEYS, TrainConfig, flatten, key_table
from sasa_train.config.overrides import as_written
from sasa_train.files import read_regular
from sasa_train.paper import differing_keys, nearest_row
from sasa_train.report.jobs import Job
from sasa_train.report.rows import Row
from sasa_train.report.tables import held_out_note, in_billions, in_millions, shown, split_of
from sasa_train.terminal import duration

MAX_LINES = 10  # maximum number of lines quoted from a file
ARTEFACTS = (
    ("config.yaml", "the resolved config"),
    ("metrics.jsonl", "one JSON object per line: loss, top1, lr, speed"),
    ("run.json", "command, commit, versions, hardware, status"),
    ("checkpoints/*.pt", "checkpoint"),
    ("tensorboard", "curves: tensorboard --logdir on the folder"),
    ("augmented.png", "the first batch as the model saw it"),
    ("changes-*.diff", "uncommitted changes at the start"),
    ("unreadable.txt", "images that could not be read"),
    ("nonfinite.txt", "the origin of a loss that was not finite"),
    ("profile", "a trace and the top operators"),
)


def headline(job: Job) -> list[tuple[str, str, str]]:
    """Return the name and value of each headline figure, along with a note."""
    if not job.val:
        return []
    last, best, figure = job.val[-1], job.best_row, job.figure
    assert job.config is not None
    use = "the figure to publish" if job.state == "done" else "the run is not finished"
    of_last = f"after epoch {last['epoch']} of {job.config.trainer.epochs}; {use}"
    of_best = f"after epoch {best['epoch']}; selected on val, so it is optimistic"
    kept = job.info.get("best")
    if isinstance(kept, dict) and kept.get("step") != best["step"] and kept.get("top1") != best["top1"]:
        of_best += "; best.pt is another, because the save of this one failed"
    notes = (("last", last, of_last), ("best", best, of_best))
    return [(f"{figure}, {which} epoch", f"{row[figure]:.2f} %", note) for which, row, note in notes]


def key_facts(job: Job, row: Row) -> list[tuple[str, str]]:
    """Return one line per fact, leaving out unknown ones."""
    config, info = job.config, job.info
    assert config is not None
    last = job.val[-1] if job.val else {}
    found = {
        "model": _model(config),
        "val": split_of(config),
        "top1, last epoch": "" if job.figure == "top1" else shown(last.get("top1"), "{:.2f} %", ""),
        "val loss": shown(last.get("loss"), "{:.4f}", ""),
        "top5, last epoch": shown(last.get("top5"), "{:.2f} %", "") if has_top5(row.num_classes or 1000) else "",
        "parameters": shown(row.params, "{:,}", ""),
        "GFLOPs": f"{in_billions(row.flops)}, one image, forward" if row.flops else "",
        "speed": shown(job.images_per_sec, "{:,.0f} images/s in training, median of the train rows", ""),
        "training time": "" if job.seconds is None else f"{duration(job.seconds)}, without evaluations",
        "device": _device(job),
        "batch": f"{config.trainer.global_batch_size} images per step",
        "seed": str(config.seed),
        "status": _status(job),
        "restarts": str(max(len(starts(info)) - 1, 0) or ""),
    }
    return [(name, text) for name, text in found.items() if text]


def _status(job: Job) -> str:
    stopped = job.state == "done" and job.info.get("status") == "stopped"
    return f"{job.state}, stopped by {job.info.get('reason')}" if stopped else job.state


def for_terminal(job: Job, row: Row, said: list[str], width: int | None) -> str:
    """Return a run's result for a terminal of `width` columns (None: no limit): its first sentences, then its facts."""
    pairs = [(name, f"{number}, {note}") for name, number, note in headline(job)] + key_facts(job, row)
    size = max(len(name) for name, _ in pairs) + 2
    blocks = [
        [(job.name, "")],
        [(text, "") for text in said or ["There is no evaluation yet."]],
        [(f"{name:<{size}}{text}", " " * size) for name, text in pairs],
        [(f"WARNING: {text}" + (f" ({quoted[0]})" if quoted else ""), "") for text, quoted in warnings(job)],
    ]
    wrapped = ([_wrapped(text, width, indent) for text, indent in block] for block in blocks if block)
    return "\n\n".join("\n".join(lines) for lines in wrapped) + "\n"


def _wrapped(text: str, width: int | None, indent: str) -> str:
    if width is None:
        return text
    # Neither paths nor words are broken, so that they can be copied.
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _model(config: TrainConfig) -> str:
    given = {key: value for key in MODEL_KEYS if (value := getattr(config.model, key)) is not None}
    return ", ".join([config.model.title, *(f"{key}={as_written(value)}" for key, value in given.items())])


def _device(job: Job) -> str:
    assert job.config is not None
    info, trainer = job.info, job.config.trainer
    if not info:
        return ""
    gpu = info.get("gpu") if trainer.device != "cpu" else None
    name = str(gpu) if gpu else f"CPU, threads: {info.get('threads')}"
    num_processes = info.get("world_size", 1)
    return f"{name}, {trainer.precision}" + (f", {num_processes} processes" if num_processes != 1 else "")


def starts(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the starts and restarts recorded in run.json, skipping damaged entries."""
    found = info.get("starts")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def environment(job: Job) -> list[tuple[str, str]]:
    """Return the machine, the code version and the package versions."""
    info = job.info
    keys = ("started", "host", "platform", "processors", "threads", "world_size", "gpu", "directory", "commit")
    names = {"world_size": "processes", "gpu": "GPU"}
    rows = [(names.get(key, key), str(info[key])) for key in keys if info.get(key) is not None]
    if "dirty" in info:
        rows.append(("uncommitted changes", "yes, in the diff among the files" if info["dirty"] else "none"))
    if isinstance(info.get("not_in_git"), list) and info["not_in_git"]:
        rows.append(("files not in git", str(len(info["not_in_git"]))))
    versions = info.get("versions")
    if isinstance(versions, dict):
        rows += [(str(name), str(version)) for name, version in versions.items() if version is not None]
    return rows


def changed_keys(config: TrainConfig) -> list[tuple[str, str, str, str]]:
    """Return the key, value, default and description of each key that differs from its default."""
    defaults, meanings = flatten(compose_config([])), key_table()
    return [
        (key, as_written(value), as_written(defaults[key]), meanings[key].metadata["help"])
        for key, value in flatten(config).items()
        if value != defaults[key]
    ]


def artefacts(run_dir: Path, folder: Path) -> list[tuple[str, str, str, str]]:
    """List the run's files: name, link from a page in `folder`, human-readable size ("" for folders), description."""
    found = [(path, meaning) for pattern, meaning in ARTEFACTS for path in sorted(run_dir.glob(pattern))]
    return [
        (str(path.relative_to(run_dir)) + "/" * path.is_dir(), href(path, folder), _size(path), meaning)
        for path, meaning in found
        if path.exists()
    ]


def href(path: Path, folder: Path) -> str:
    """Return a link from a page in `folder`, escaped so that no file name is interpreted as an external URL."""
    return quote(os.fsencode(os.path.relpath(path, folder))) + "/" * path.is_dir()


def _size(path: Path) -> str:
    size = path.stat().st_size
    return "" if path.is_dir() else f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} KB"


def warnings(job: Job) -> Iterator[tuple[str, list[str]]]:
    """Yield a sentence and any quoted lines for everything that a reader must know before trusting the figures."""
    run_dir, config = job.run_dir, job.config
    assert run_dir is not None and config is not None
    if job.state == "damaged":
        yield "The run's files are damaged, and its figures are not used.", job.reason.splitlines()[:MAX_LINES]
    elif job.state != "done":
        so_far = f"evaluated up to epoch {job.val[-1]['epoch'] if job.val else 0} of {config.trainer.epochs}"
        command = f"sasa-train {shlex.quote(f'resume={as_written(str(run_dir))}')}"
        text = f"The run is not finished ({job.state}): {so_far}. To continue it: {command}"
        yield text, job.reason.splitlines()[:MAX_LINES]
    for name, text in (
        ("unreadable.txt", "{} images could not be read and were replaced or left out."),
        ("nonfinite.txt", "A loss was not finite."),
    ):
        if lines := _lines(run_dir / name):
            left_out = len(lines) - MAX_LINES
            more = [f"and {left_out} more lines in the file"] if left_out > 0 else []
            yield text.format(len(lines)), lines[:MAX_LINES] + more
    if damaged := sorted(path.name for path in run_dir.glob("checkpoints/*.damaged")):
        yield f"Damaged checkpoints were found and put aside: {', '.join(damaged)}.", []
    if config.data.name == "digits":
        yield "The digits prove that the machinery works, no more: a map of 8 pixels is one window.", []


def _lines(path: Path) -> list[str]:
    try:
        return read_regular(path).decode(errors="replace").splitlines()
    except OSError:
        return []


def beside_paper(job: Job, row: Row) -> dict[str, Any] | None:
    """Compare a run with the paper's entry for `row` or, if there is none, with that of the most similar model.

    Return None for other data than the paper's and for models that are not from the paper. `differing` lists keys as
    "width=0.25 (the paper's 1.0)"; `held_out` is a caveat or an empty string.
    """
    config = job.config
    assert config is not None
    keys = vars(config.model)
    paper = row.paper or nearest_row(keys)
    if paper is None or config.data.name != "imagenet":
        return None
    differing = ", ".join(
        f"{key}={as_written(ours)} (the paper's {as_written(papers)})"
        for key, (papers, ours) in differing_keys(paper, keys).items()
        if key != "family"  # redundant: it names a combination of stem and stage_ops
    )
    size = resolved_size(config.data)
    columns = ("whose", "model", "data", "top1, last epoch", "M params", "GFLOPs")
    top1 = shown(job.val[-1]["top1"] if job.val else None, "{:.2f}")
    of_ours = (
        config.model.title,
        f"{config.data.title} at {in_pixels(size).removesuffix(' pixels')}",
        top1,
        in_millions(row.params),
        in_billions(row.flops),
    )
    of_paper = (f"{paper.top1:.1f}", shown(paper.mparams, "{:.1f}"), f"{paper.gflops:.1f}")
    lines = ("ours", *of_ours), ("the paper's", f"Table {paper.table}: {paper.label}", "ImageNet at 224", *of_paper)
    note = held_out_note(paper.table, [config])
    return {
        "rows": [dict(zip(columns, line, strict=True)) for line in lines],
        "differing": differing,
        "is_same_size": size == (224, 224),
        "held_out": f"{note[0].upper()}{note[1:]}." if note else "",
    }
