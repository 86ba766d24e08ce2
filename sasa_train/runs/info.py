"""run.json, which records a run's command, code, machine and status; only the run itself writes it."""

import json
from pathlib import Path
from typing import Any

from sasa_train.files import read_regular, write_atomic
from sasa_train.runs.schema import PLAIN, Maybe, first_wrong, number

NAME = "run.json"
# Other entries are only compared or shown.
CHECKED = {"starts": Maybe(list), "seconds": Maybe(number(0))}


def read_info(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json without wrong entries, or {} if it is missing or damaged.

    The next write then recreates it.
    """
    try:
        info = json.loads(read_regular(run_dir / NAME))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = info.items() if isinstance(info, dict) else ()
    return {k: v for k, v in entries if not first_wrong(v, PLAIN) and not first_wrong({k: v}, CHECKED)}


def update_info(run_dir: Path, changes: dict[str, Any]) -> None:
    write_atomic(run_dir / NAME, json.dumps(read_info(run_dir) | changes, indent=2).encode())


def has_finished(run_dir: Path) -> bool:
    """Whether run.json reports the run as finished and its last checkpoint still exists."""
    return read_info(run_dir).get("status") == "finished" and (run_dir / "checkpoints/last.pt").exists()
