"""A run's folder: which one, who holds it, what it says about itself."""

import datetime
import fcntl
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from sasa_train.atomic import write_atomic
from sasa_train.checkpoint import Checkpoints, load_checkpoint
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

    def write_config(self, config: TrainConfig) -> None:
        write_atomic(self.path / "config.yaml", to_yaml(config).encode())

    def write_info(self, **changes: Any) -> None:
        """Update run.json."""
        write_atomic(self.path / "run.json", json.dumps(self._info() | changes, indent=2).encode())

    def write_start(self, step: int) -> None:
        """Note in run.json what runs now, and in its `starts` every time the run was started or continued."""
        now = provenance()
        start = {key: now[key] for key in ("started", "command", "commit", "host")} | {"step": step}
        self.write_info(**now, starts=[*self._info().get("starts", []), start], status="running")

    def _info(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):  # not there yet
            return {}


def open_run(config: TrainConfig, run_name: str) -> RunFolder:
    """Find or make the run's folder, lock it, and load what it continues from.

    Raises:
        ConfigError: another live run holds the folder, `resume` names nothing, or the config has another trajectory.
        CheckpointError: the folder has checkpoints and none is good, or the one named by `resume` is not.
    """
    source, wanted = Path(config.resume), Path(config.output_dir) / run_name
    given = None
    if config.resume == "auto":
        path = wanted
    elif config.resume == "never":
        path = _new_folder(wanted)
    elif source.is_dir():
        path = source
    elif source.is_file():
        given = load_checkpoint(source) | {"best": None}  # its best.pt stays in the other folder
        check_trajectory(given, config, source)
        if is_finished(given, config):
            raise ConfigError(
                f"resume={source} is finished; to train it further: trainer.epochs=... and {_allow(['trainer.epochs'])}"
            )
        path = _folder_started_from(wanted, config.resume)
    else:
        raise ConfigError(f"resume={config.resume} must be auto, never, a run folder or a checkpoint; it is not there")
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
        checkpoints = Checkpoints(path / "checkpoints", config.trainer.keep_checkpoints)
        own = checkpoints.newest(warn=lambda text: print(f"WARNING: {text}", file=sys.stderr))
        if own is None and path == source:
            raise ConfigError(f"resume={config.resume}: the folder has no checkpoint to continue from")
        if own is not None:
            check_trajectory(own, config, path)
        for stale in path.glob("*.tmp"):  # of a start that was killed
            stale.unlink()
        return RunFolder(path, lock, checkpoints, own or given)
    except BaseException:
        lock.close()
        raise


def check_trajectory(checkpoint: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Refuse to continue a checkpoint with a config that would have led elsewhere, but where the user allows it."""
    saved = load_config(checkpoint["config"], source=f"the config in the checkpoint of {path}")
    keys = [key for key in differing_keys(saved, config) if key not in config.allow_config_change]
    if keys:
        old, new = flatten(saved), flatten(config)
        changes = "\n".join(f"  {key}: {old.get(key)} -> {new.get(key)}" for key in keys)
        raise ConfigError(
            f"{path} was trained with another config (checkpoint -> now):\n{changes}\n"
            "give the old values, or another run_name, or resume=never for a new run; to continue all the same: "
            + _allow(keys)
        )


def is_finished(checkpoint: dict[str, Any], config: TrainConfig) -> bool:
    """Finished under this very config; an allowed change (more epochs, say) trains it further."""
    return checkpoint["finished"] and not differing_keys(load_config(checkpoint["config"]), config)


def _allow(keys: list[str]) -> str:
    return f"allow_config_change=[{','.join(keys)}]"


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


def _numbered(wanted: Path) -> Iterator[Path]:
    """`wanted`, `wanted-2`, `wanted-3`, ..."""
    return (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(1))


def _new_folder(wanted: Path) -> Path:
    """The first numbered folder that does not exist, made here and now, so that no other run takes it too."""
    for path in _numbered(wanted):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _folder_started_from(wanted: Path, resume: str) -> Path:
    """The numbered folder that the same command made before, or a new one."""
    for path in _numbered(wanted):
        if not path.exists():
            return _new_folder(wanted)
        try:
            if load_config((path / "config.yaml").read_text()).resume == resume:
                return path
        except (OSError, ConfigError):
            continue
    raise AssertionError("unreachable")


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
