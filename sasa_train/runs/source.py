"""The run or checkpoint given to a command, and its checks that do not need PyTorch, whose import takes seconds."""

import os
from collections.abc import Sequence
from pathlib import Path

from sasa_train.processes.ranks import world_size
from sasa_train.refusal import CheckpointError, ConfigError
from sasa_train.terminal import some


def find_checkpoint(source: Path) -> Path:
    """Return `source` itself if it is not a folder; otherwise, return the run's best.pt or, if it has none, last.pt."""
    if not os.path.isdir(source):  # also for a name that is invalid on any file system
        return source
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    return folder / "best.pt" if (folder / "best.pt").exists() else folder / "last.pt"


def check_source(source: Path, overrides: Sequence[str]) -> None:
    """Check the arguments of a command that reads a checkpoint, as far as this is possible without reading it.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: an override is invalid for any checkpoint, `source` is a folder of runs, or this is one of several
            processes, which would all do the same work.
    """
    # Imported here, because importing Hydra takes a tenth of a second, and `load_trained` needs it only for overrides.
    from sasa_train.config.overrides import split_weights
    from sasa_train.config.saved import check_overrides

    if world_size() > 1:
        raise ConfigError(f"WORLD_SIZE={world_size()}: this is one process's work; run it without torchrun")
    path = find_checkpoint(source)
    check_overrides(split_weights(overrides)[1], source=str(path))
    if os.path.exists(path):
        return
    if runs := _runs_in(source):
        raise ConfigError(
            f"{source}: is not a run folder, but holds the runs {some(runs)}; give one of them (sasa-report --list "
            f"{source} shows how good they are)"
        )
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: cannot be read (No such file or directory)")


def _runs_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.yaml")) if os.path.isdir(folder) else []
