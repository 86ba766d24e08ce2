"""A run's folder: which one, who holds it, what it says about itself."""

import datetime
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from sasa_train.checkpoint import Checkpoints, load_checkpoint, write_atomic
from sasa_train.compose import load_config, to_yaml
from sasa_train.config import ConfigError, TrainConfig, differing_keys, flatten

PACKAGES = ("torchvision", "timm", "hydra-core", "omegaconf", "numpy", "sasa_train")


@dataclass
class RunFolder:
    """`path` is ours alone while `lock` is open; `checkpoint` is where to go on from, or None at the beginning."""

    path: Path
    lock: IO[str]
    checkpoints: Checkpoints
    checkpoint: dict[str, Any] | None

    def write_info(self, **changes: Any) -> None:
        """Update run.json."""
        file = self.path / "run.json"
        try:
            info = json.loads(file.read_text())
        except (OSError, ValueError):  # not there yet
            info = {}
        write_atomic(file, json.dumps(info | changes, indent=2).encode())


def open_run(config: TrainConfig, run_name: str) -> RunFolder:
    """Find or make the run's folder, lock it, and load what it continues from.

    Raises:
        ConfigError: another live run holds the folder, `resume` names nothing, or the config has another trajectory.
        CheckpointError: the folder has checkpoints and none is good, or the one named by `resume` is not.
    """
    source = Path(config.resume)
    starts_from_file = config.resume not in ("auto", "never") and source.is_file()
    if config.resume in ("auto", "never") or starts_from_file:
        wanted = Path(config.output_dir) / run_name
        path = _new_folder(wanted) if config.resume == "never" else wanted
        if starts_from_file and wanted.exists() and not _was_started_from(wanted, config.resume):
            path = _new_folder(wanted)
    elif source.is_dir():
        path = source
    else:
        raise ConfigError(f"resume={config.resume} must be auto, never, a run folder or a checkpoint; it is not there")
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
        checkpoints = Checkpoints(path / "checkpoints", config.trainer.keep_checkpoints)
        checkpoint = checkpoints.newest(warn=lambda text: print(f"WARNING: {text}", file=sys.stderr))
        if checkpoint is None and starts_from_file:
            checkpoint = load_checkpoint(source) | {"best": None}  # its best.pt stays in the other folder
        if checkpoint is None and path == source:
            raise ConfigError(f"resume={config.resume}: the folder has no checkpoint to continue from")
        if checkpoint is not None:
            check_trajectory(checkpoint, config, path)
        write_atomic(path / "config.yaml", to_yaml(config).encode())
    except BaseException:
        lock.close()
        raise
    return RunFolder(path, lock, checkpoints, checkpoint)


def check_trajectory(checkpoint: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Refuse to continue a checkpoint with a config that would have led elsewhere."""
    saved = load_config(checkpoint["config"], source=f"the checkpoint in {path}")
    keys = differing_keys(saved, config)
    if keys:
        old, new = flatten(saved), flatten(config)
        changes = "\n".join(f"  {key}: {old.get(key)} -> {new.get(key)}" for key in keys)
        raise ConfigError(
            f"{path} was trained with another config (checkpoint -> now):\n{changes}\n"
            "give the old values, or another run_name, or resume=never for a new run; to continue all the same: "
            f"allow_config_change=[{','.join(keys)}]"
        )


def provenance() -> dict[str, Any]:
    """What made this run: the command, code, packages and machine."""
    return {
        "command": shlex.join(sys.argv),
        "directory": os.getcwd(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _new_folder(wanted: Path) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ...: the first that does not exist, made here and now."""
    number = 1
    while True:
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def _was_started_from(path: Path, resume: str) -> bool:
    try:
        return load_config((path / "config.yaml").read_text()).resume == resume
    except (OSError, ConfigError):
        return False


def _lock(path: Path) -> IO[str]:
    """A lock that the operating system drops when this process ends, however it ends.

    POSIX's record lock, not flock: data workers, which may outlive a killed run by seconds, do not inherit it.
    """
    file = (path / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ConfigError(
            f"{path} is in use by {file.read().strip() or 'another run'}; wait for it, or use another run_name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _git(*arguments: str) -> str | None:
    """Of the checkout this code is in; None where it is in none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
