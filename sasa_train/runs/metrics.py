"""metrics.jsonl, which has one row per log step and evaluation, with no gaps or duplicates after interruptions."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sasa_train.config.keys import TrainerConfig
from sasa_train.files import is_there, read_regular, write_atomic
from sasa_train.refusal import ConfigError
from sasa_train.runs.schema import MAX_SECONDS, Maybe, Rule, first_wrong, number, whole
from sasa_train.terminal import warn

NAME = "metrics.jsonl"
NUMBERS = ("loss", "lr", "grad_norm", "images_per_sec", "tflops", "mfu", "data_wait_fraction", "memory_mib")
PERCENTAGES = ("top1", "top5", "top1_raw", "f1_macro", "balanced_accuracy")
PERCENT = number(0, 100)
ROW: dict[str, Any] = {
    "split": Rule("train or val", lambda split: split in ("train", "val")),
    "step": whole(1),
    "epoch": whole(0),
    **dict.fromkeys(NUMBERS, Maybe((None, number()))),
    **dict.fromkeys(PERCENTAGES, Maybe((None, PERCENT))),
    "seconds": Maybe(number(0, MAX_SECONDS)),
}
VAL_ROW = ROW | {"top1": PERCENT}  # only null if it is not finite, which a percentage always is
MAX_LOG = 2**30  # bytes: some millions of rows
DAMAGE = (ValueError, TypeError, LookupError, RecursionError)  # raised for a line that is not a metrics row


class MetricsFile:
    """Writer for metrics.jsonl, which starts with the rows saved in the checkpoint (`text`) and appends new ones.

    At the start, the file is rewritten from the checkpoint's copy, which repairs any damage. All processes but the
    first pass None as `run_dir` and write nothing.
    """

    def __init__(self, run_dir: Path | None, text: str):
        self.path = Path(os.devnull) if run_dir is None else run_dir / NAME
        self._lines = text.splitlines(keepends=True)
        if run_dir is not None:
            write_atomic(self.path, text.encode())
        self._file = self.path.open("ab", buffering=0)
        self._num_written, self._size = len(self._lines), self.path.stat().st_size
        self._has_rest = False  # of rows that could not be written whole

    @property
    def text(self) -> str:
        """All rows in the format of the file, for the checkpoint."""
        return "".join(self._lines)

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row immediately, with null for NaN and infinity; return the row as written."""
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._lines.append(json.dumps(row) + "\n")
        self._flush()
        return row

    def _flush(self) -> None:
        """Append all rows that are not in the file yet, or none if that fails; the checkpoints contain them as well."""
        data = "".join(self._lines[self._num_written :]).encode()
        try:
            self._remove_rest()
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._has_rest = True
            with contextlib.suppress(OSError):  # it is tried again before the next rows
                self._remove_rest()
            warn(f"{self.path} cannot be written ({error.strerror}); its rows wait for room")
            return
        self._num_written, self._size = len(self._lines), self._size + len(data)

    def _remove_rest(self) -> None:
        if self._has_rest:
            self._file.truncate(self._size)
            self._has_rest = False

    def close(self) -> None:
        self._flush()
        self._file.close()


def read_metrics(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Return all rows except an incomplete last row, which a run may be writing.

    Raises:
        ConfigError: the file is damaged; with `skip_damaged`, the intact rows are returned instead.
    """
    if not is_there(path):  # the run ended before its first row
        return []
    rows = []
    try:
        text = read_regular(path, MAX_LOG).decode(errors="replace" if skip_damaged else "strict")
        for line in text.splitlines(keepends=True):
            # An editor may have removed the last line break. A row is complete if its last brace is there.
            with contextlib.suppress(*DAMAGE if skip_damaged or not line.endswith("\n") else ()):
                rows.append(_parsed(line))
    except (OSError, *DAMAGE) as error:
        if not skip_damaged:
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    return rows


def _parsed(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if wrong := first_wrong(row, VAL_ROW if row["split"] == "val" else ROW):
        raise ValueError(wrong)
    return row


def parse_log(text: str) -> list[dict[str, Any]]:
    """Return the rows of a text that consists of whole lines; raise one of DAMAGE if a line is not a metrics row."""
    return [_parsed(line) for line in text.splitlines()]


def end_of(text: str) -> dict[str, Any]:
    """Return what run.json records of a log when the run ends, by which a changed one is found out."""
    return {"last": last_val(text), "log_sha256": digest_of(text)}


def last_val(text: str) -> dict[str, Any] | None:
    """Return step, epoch and top1 of the last val row of a log, or None if it has none."""
    val = [row for row in parse_log(text) if row["split"] == "val"]
    return {key: val[-1][key] for key in ("top1", "step", "epoch")} if val else None


def digest_of(text: str) -> str:
    """Return the SHA-256 of a log, with or without its last line break."""
    return hashlib.sha256(text.rstrip("\n").encode(errors="replace")).hexdigest()


def score(row: dict[str, Any], metric: str) -> float:
    """Return a val row's value of a metric of BEST_METRICS, negative for the loss, so that the highest is the best.

    It is -inf where the value was not finite, or is missing, as in the rows of earlier versions.
    """
    value = row.get(metric)
    if value is None:
        return -math.inf
    return -value if metric == "loss" else value


def best_row(val: Iterable[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """Return the first of the best val rows by a metric of BEST_METRICS, or None if there are none."""
    return max(val, key=lambda row: score(row, metric), default=None)


def is_out_of_patience(trainer: TrainerConfig, text: str) -> bool:
    """Whether the last `trainer.patience` evaluations of a log did not improve `best_metric` by more than `min_delta`.

    Each is compared with the best of those before that counted as an improvement themselves.
    """
    to_beat, num_in_vain = -math.inf, 0
    for row in parse_log(text) if trainer.patience is not None else ():
        if row["split"] == "val":
            found = score(row, trainer.best_metric)
            is_better = found > to_beat + trainer.min_delta
            to_beat, num_in_vain = (found, 0) if is_better else (to_beat, num_in_vain + 1)
    return trainer.patience is not None and num_in_vain >= trainer.patience


def lost_best(text: str, best: dict[str, Any] | None, metric: str) -> dict[str, Any] | None:
    """Return the best val row of a log if it is better than `best`, whose model is kept: its own save has failed."""
    found = best_row((row for row in parse_log(text) if row["split"] == "val"), metric)
    return found if found and (best is None or score(found, metric) > score(best, metric)) else None


def describe_value(row: dict[str, Any], metric: str) -> str:
    """Format what makes a row the best: its top1 or, by another metric, that with its name, and top1."""
    if metric == "top1":
        return f"{row['top1']:.2f}"
    value = row.get(metric)
    shown = "unknown" if value is None else f"{value:.4f}" if metric == "loss" else f"{value:.2f}"
    return f"{metric} {shown}, top1 {row['top1']:.2f},"


def is_log(text: Any) -> bool:
    """Return whether a text consists of whole lines, each of which is a metrics row."""
    try:
        # json.dumps escapes all other characters.
        is_whole = isinstance(text, str) and text.isascii() and (not text or text.endswith("\n"))
        return is_whole and parse_log(text) is not None
    except DAMAGE:
        return False
