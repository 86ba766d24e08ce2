"""metrics.jsonl as it is read again; logger.py writes it."""

import json
from pathlib import Path
from typing import Any

from sasa_train.refusal import ConfigError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every row; of a run that goes on, the last line may be half there.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.exists():  # it ended, or was stopped, before its first row
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        whole = all(_is_row(row) for row in rows)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not whole:
        raise ConfigError(f"{path}: a row without split, step and epoch, or a val row without top1")
    return rows


def _is_row(row: Any) -> bool:
    keys = ("step", "epoch", "top1") if row["split"] == "val" else ("step", "epoch")
    return all(isinstance(row[key], int | float) for key in keys)
