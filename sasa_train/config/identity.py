"""The keys that determine what a run computes, and the run folder's name, which is derived from them."""

import hashlib
import json
import re
from typing import Any

from sasa_train.config.keys import NOT_TRAJECTORY, TrainConfig, flatten


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """Return the keys that affect what a run computes, with their values."""
    return {key: value for key, value in flatten(config).items() if key not in NOT_TRAJECTORY}


def default_run_name(config: TrainConfig) -> str:
    """Return a stable name made of the data set, model, epochs, seed and an 8-digit hash of `trajectory(config)`."""
    # Only values that differ from the defaults are included, so that a new key in a later version does not rename runs.
    defaults = flatten(TrainConfig())
    identity = {key: value for key, value in trajectory(config).items() if value != defaults[key]}
    if config.data.name != "digits":
        identity["data.root"] = config.data.root
    if config.resume not in ("auto", "never"):
        identity["resume"] = config.resume
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.model.name)
    return f"{config.data.name}-{model}-e{config.trainer.epochs}-s{config.seed}-{digest}"


def differing_keys(old: TrainConfig, new: TrainConfig, same_world_size: bool = True) -> list[str]:
    """List the keys that affect what a run computes and differ between two configs."""
    # The split into micro-batches depends on the number of processes, so it may differ if that number has changed.
    before, after = trajectory(old), trajectory(new)
    may_differ = new.trainer.micro_batch_size == "auto" or not same_world_size  # auto keeps the saved size
    ignored = ("trainer.micro_batch_size", "trainer.grad_accum_steps") if may_differ else ()
    return sorted(key for key in before if before[key] != after[key] and key not in ignored)
