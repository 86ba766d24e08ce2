"""The keys that determine what a run computes, and the run folder's name, which is derived from them."""

import hashlib
import json
import os
import re
from typing import Any

from sasa_train.config.keys import NOT_TRAJECTORY, TrainConfig, flatten, names_source

NOT_IN_NAMES = r"[^A-Za-z0-9_.-]+"
# Keys that presets list in `derive` since a later version; they have no part in the names of runs.
LATER_DERIVED = tuple(
    f"model.{name}" for name in ("dilation", "scale", "null_key", "share_rel", "own_value", "axial", "padding")
)
MAX_DATA_NAME = 60  # characters of a data or model folder's name in a run's name


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """Return the keys that affect what a run computes, with their values."""
    local = NOT_TRAJECTORY | ({"data.dataset"} if config.data.name == "hf" else set())  # a folder, which may move
    return {key: value for key, value in flatten(config).items() if key not in local}


def default_run_name(config: TrainConfig) -> str:
    """Return a stable name made of the data set, model, epochs, seed and an 8-digit hash of `trajectory(config)`.

    A set of one's own is named after its folder. Keys in `derive` have no part in the name, because a run is named
    after what was asked, not after what was chosen from the images.
    """
    parts = [data_name(config)]
    parts += [] if "model.name" in config.derive else [_model_name(config)]
    parts += [] if "trainer.epochs" in config.derive else [f"e{config.trainer.epochs}"]
    return "-".join([*parts, f"s{config.seed}", _digest(config)])


def run_name_in(folder: str, config: TrainConfig) -> str:
    """Return the name of a config's run in `folder`: an existing run keeps a name of the form of earlier versions."""
    name = default_run_name(config)
    earlier = f"{config.data.name}{name.removeprefix(data_name(config))}"
    is_earlier = os.path.isdir(os.path.join(folder, earlier)) and not os.path.isdir(os.path.join(folder, name))
    return earlier if is_earlier else name


def data_name(config: TrainConfig) -> str:
    """Return the data set's name in a run's name; of a set of one's own, its folder's or its function's."""
    if config.data.target is not None:
        return re.sub(NOT_IN_NAMES, "-", config.data.target)[-MAX_DATA_NAME:]
    return as_data_name(config.data.title) or config.data.name


def as_data_name(title: str) -> str:
    """Return a data set's title as it is written in names, which may be empty."""
    return re.sub(NOT_IN_NAMES, "-", title).lstrip(".-")[:MAX_DATA_NAME]


def _model_name(config: TrainConfig) -> str:
    name = config.model.title
    if not names_source(name):
        return re.sub(NOT_IN_NAMES, "-", name)
    kind, _, place = name.partition(":")
    place = os.path.basename(os.path.abspath(place)) if kind == "local-dir" else place
    return re.sub(NOT_IN_NAMES, "-", place).lstrip(".-")[:MAX_DATA_NAME] or "model"


def _digest(config: TrainConfig) -> str:
    # Only values that differ from the defaults are included, so that a new key in a later version does not rename runs.
    defaults = flatten(TrainConfig())
    asked = {key: value for key, value in trajectory(config).items() if key not in config.derive}
    identity = {key: value for key, value in asked.items() if value != defaults[key]}
    if config.derive:
        identity["derive"] = sorted(key for key in config.derive if key not in LATER_DERIVED)
    if config.data.name != "digits":
        identity["data.root"] = config.data.root
    for key in ("train", "val", "dataset"):
        if (path := getattr(config.data, key)) is not None:
            identity[f"data.{key}"] = path
    if config.resume not in ("auto", "never"):
        identity["resume"] = config.resume
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def differing_keys(old: TrainConfig, new: TrainConfig, same_world_size: bool = True) -> list[str]:
    """List the keys that affect what a run computes and differ between two configs."""
    # The split into micro-batches depends on the number of processes, so it may differ if that number has changed.
    before, after = trajectory(old), trajectory(new)
    may_differ = new.trainer.micro_batch_size == "auto" or not same_world_size  # auto keeps the saved size
    ignored: tuple[str, ...] = ("trainer.micro_batch_size", "trainer.grad_accum_steps") if may_differ else ()
    # A teacher's file may have moved; `check_teacher` in runs/folder.py compares its content.
    if old.distill.file is not None and new.distill.file is not None:
        ignored = (*ignored, "distill.teacher")
    return sorted(key for key in before if before[key] != after[key] and key not in ignored)
