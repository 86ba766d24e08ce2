"""Which keys shape what a run computes, and the name of its folder that follows from them."""

import hashlib
import json
import re
from typing import Any

from sasa_train.config.keys import NOT_TRAJECTORY, TrainConfig, flatten


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """The keys that change what a run computes."""
    return {key: value for key, value in flatten(config).items() if key not in NOT_TRAJECTORY}


def default_run_name(config: TrainConfig) -> str:
    """Readable and stable: model, data, epochs, seed, and 8 hex digits of the whole trajectory.

    Of what differs from the defaults, so that a key of a later version does not give all runs other names.
    """
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
    """The keys that two configs set differently and that change what a run computes.

    How the global batch is cut into micro-batches follows from the number of processes, so where that differs, it may.
    """
    before, after = trajectory(old), trajectory(new)
    may_differ = new.trainer.micro_batch_size == "auto" or not same_world_size  # auto goes on with what it began with
    ignored = ("trainer.micro_batch_size", "trainer.grad_accum_steps") if may_differ else ()
    return sorted(key for key in before if before[key] != after[key] and key not in ignored)
