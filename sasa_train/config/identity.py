"""The keys that shape what a run computes, and the name of its folder, which follows from them."""

import hashlib
import json
import re
from typing import Any

from sasa_train.config.keys import NOT_TRAJECTORY, TrainConfig, flatten


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """Return the keys that change what a run computes, and their values."""
    return {key: value for key, value in flatten(config).items() if key not in NOT_TRAJECTORY}


def default_run_name(config: TrainConfig) -> str:
    """Return a readable, stable name: model, data, epochs, seed, and 8 hex digits of the whole trajectory."""
    # Only what differs from the defaults counts, so that a later version's new key does not rename all runs.
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
    """List the keys that two configs set differently and that change what a run computes."""
    # How the global batch is cut into micro-batches follows from the number of processes; with another, it may differ.
    before, after = trajectory(old), trajectory(new)
    may_differ = new.trainer.micro_batch_size == "auto" or not same_world_size  # auto goes on with what it began with
    ignored = ("trainer.micro_batch_size", "trainer.grad_accum_steps") if may_differ else ()
    return sorted(key for key in before if before[key] != after[key] and key not in ignored)
