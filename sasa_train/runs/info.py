"""run.json, which records a run's command, code, machine and status; only the run itself writes it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sasa_train.config.overrides import parse_overrides
from sasa_train.files import is_there, read_regular, write_atomic
from sasa_train.runs import metrics
from sasa_train.runs.metrics import read_metrics
from sasa_train.runs.schema import MAX_SECONDS, PLAIN, TRACKER_ID, Maybe, first_wrong, number, whole

NAME = "run.json"
MAX_CONFIG_BYTES = 2**18  # of config.yaml, of which `load_config` takes 2**16 characters
ENDED = ("finished", "stopped")  # statuses of runs that no signal or error ended; hooks of the user's own stop a run
# Other entries are only compared or shown.
CHECKED = {
    "starts": Maybe(list),
    "seconds": Maybe(number(0, MAX_SECONDS)),
    "num_val_images": Maybe(whole(1, 10**8)),
    "tracker_id": Maybe(TRACKER_ID),
}


def read_info(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json for showing; {} if it cannot be read either."""
    try:
        return read_info_or_raise(run_dir)
    except OSError:
        return {}


def read_info_or_raise(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json without wrong entries, or {} if it is missing or damaged.

    The next write then recreates it.

    Raises:
        OSError: the file is there but cannot be read, for example because of a disk error; it may be whole.
    """
    try:
        info = json.loads(read_regular(run_dir / NAME))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(run_dir / NAME)) from error  # a failed read names no file
    entries = info.items() if isinstance(info, dict) else ()
    return {k: v for k, v in entries if not first_wrong(v, PLAIN) and not first_wrong({k: v}, CHECKED)}


def update_info(run_dir: Path, changes: dict[str, Any]) -> None:
    """Change entries of run.json; raise OSError, and leave the file as it is, if it cannot be read or written."""
    write_atomic(run_dir / NAME, json.dumps(read_info_or_raise(run_dir) | changes, indent=2).encode())


def has_finished(run_dir: Path, overrides: Sequence[str] = ()) -> bool:
    """Whether run.json reports the run as finished, or stopped by a hook, and its last checkpoint still exists.

    A status "finished" that the last evaluation belies, as one written by hand does, does not count.

    overrides: those of the job whose run this must be; only numbers are compared, because a run replaces no other.
    """
    info = read_info(run_dir)
    if info.get("status") not in ENDED or not is_there(run_dir / "checkpoints/last.pt"):
        return False
    last = info.get("last")
    if not isinstance(last, dict) or not {"step", "epoch"} <= last.keys():  # as in runs of earlier versions
        rows = [row for row in read_metrics(run_dir / metrics.NAME, skip_damaged=True) if row["split"] == "val"]
        last = rows[-1] if rows else {"step": 0, "epoch": 0}
    try:
        # A sweep asks this of hundreds of runs, and `load_config` takes six times as long.
        config = yaml.safe_load(read_regular(run_dir / "config.yaml", MAX_CONFIG_BYTES))
        is_whole = info["status"] == "stopped" or not ends_early(config["trainer"], last)
        given = {override.key_or_group: override.value() for override in parse_overrides(list(overrides))}  # last wins
        return is_whole and not any(_differs(config, key, value) for key, value in given.items())
    except Exception:  # a file from anyone, of which PyYAML raises whatever its parts do
        return True  # it is for those to say who need the config


def _differs(config: Any, key: str, given: Any) -> bool:
    """Whether a config has another number for a key than the given one."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return isinstance(given, int | float) and config is not None and given != config


def ends_early(trainer: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether a run whose last val row is `last` has more to train by its config, and no other rule may end it."""
    most = {"epoch": trainer["epochs"], "step": trainer["max_steps"]}
    may_end = trainer["max_pflops"] is not None or trainer["patience"] is not None
    return not may_end and all(last[name] < (math.inf if count is None else count) for name, count in most.items())
