"""metrics.jsonl: one row per log step and evaluation, written as one clean series whatever interrupts the run."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from sasa_train.files import write_atomic
from sasa_train.refusal import ConfigError
from sasa_train.terminal import warn

NAME = "metrics.jsonl"
DAMAGE = (ValueError, TypeError, LookupError, RecursionError)  # raised by a line that is not one of ours


class MetricsFile:
    """The file while a run writes it: the rows that the checkpoint holds (`text`), then what the run adds.

    It begins as the checkpoint's copy, so that it is whole again whatever happened to it. All processes but the first
    give None as `run_dir`, which writes nothing.
    """

    def __init__(self, run_dir: Path | None, text: str):
        self.path = Path(os.devnull) if run_dir is None else run_dir / NAME
        self._lines = text.splitlines(keepends=True)
        if run_dir is not None:
            write_atomic(self.path, text.encode())
        self._file = self.path.open("ab", buffering=0)
        self._num_written, self._size = len(self._lines), self.path.stat().st_size

    @property
    def text(self) -> str:
        """All rows as in the file, for the checkpoint."""
        return "".join(self._lines)

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row at once, with null for numbers that JSON does not have; return the row as written."""
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._lines.append(json.dumps(row) + "\n")
        self._flush()
        return row

    def _flush(self) -> None:
        """Append the rows that are not in the file yet, all or none; the checkpoints have them too."""
        data = "".join(self._lines[self._num_written :]).encode()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._size)
            warn(f"{self.path} cannot be written ({error.strerror}); its rows wait for room")
            return
        self._num_written, self._size = len(self._lines), self._size + len(data)

    def close(self) -> None:
        self._flush()
        self._file.close()


def read_metrics(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Return every row, but not a last line that a running run has written only half.

    Raises:
        ConfigError: the file is damaged; with `skip_damaged` the rows that are whole are returned instead.
    """
    if not path.exists():  # it ended, or was stopped, before its first row
        return []
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace" if skip_damaged else "strict")
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                with contextlib.suppress(*DAMAGE if skip_damaged else ()):
                    rows.append(_parsed(line))
    except (OSError, *DAMAGE) as error:
        if not skip_damaged:
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    return rows


def _parsed(line: str) -> dict[str, Any]:
    row = json.loads(line)
    numbers = ("step", "epoch", "top1") if row["split"] == "val" else ("step", "epoch")
    if not all(isinstance(row[key], int | float) for key in numbers):
        raise ValueError("a row without split, step and epoch, or a val row without top1")
    return row
