"""A run's folder: which one, who holds it, what it says about itself."""

import datetime
import fcntl
import hashlib
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from sasa_train.atomic import write_atomic
from sasa_train.checkpoint import Checkpoints, load_checkpoint
from sasa_train.compose import as_overrides, load_config, to_yaml
from sasa_train.config import ConfigError, TrainConfig, differing_keys, flatten
from sasa_train.data.fingerprint import differences

PACKAGES = ("torchvision", "timm", "hydra-core", "omegaconf", "numpy", "sasa_train")


@dataclass
class RunFolder:
    """`path` is ours alone while `lock` is open; `checkpoint` is where to go on from, or None at the beginning."""

    path: Path
    lock: IO[str]
    checkpoints: Checkpoints
    checkpoint: dict[str, Any] | None
    metrics: str | None = ""  # metrics.jsonl as the checkpoint knows it
    provenance: dict[str, Any] = field(default_factory=dict)  # of what runs now

    def write_config(self, config: TrainConfig) -> None:
        write_atomic(self.path / "config.yaml", to_yaml(config).encode())

    def write_info(self, **changes: Any) -> None:
        """Update run.json."""
        write_atomic(self.path / "run.json", json.dumps(self._info() | changes, indent=2).encode())

    def write_start(self, step: int) -> None:
        """Note in run.json what runs now, and in its `starts` every time the run was started or continued.

        What differs from the last commit is kept beside it.
        """
        now = self.provenance
        if now["difference"] is not None:
            write_atomic(self.path / now["difference"], f"{_difference()}\n".encode(errors="surrogateescape"))
        start = {key: now.get(key) for key in ("started", "command", "commit", "difference", "host")} | {"step": step}
        self.write_info(**now, starts=[*self._info().get("starts", []), start], status="running")

    def write_status(self, status: str) -> None:
        """As `write_info`, when something else ends the run, which must not be hidden by a full disk."""
        try:
            self.write_info(status=status)
        except OSError as error:
            warn(f"{self.path}/run.json cannot be written ({error.strerror})")

    def write_end(self, checkpoint: dict[str, Any]) -> None:
        """What is left to write of a finished run, or was damaged since."""
        self.write_info(status="finished", best=checkpoint["best"])
        metrics, path = checkpoint["metrics"], self.path / "metrics.jsonl"
        if metrics is not None and (not path.exists() or path.read_bytes() != metrics.encode()):
            write_atomic(path, metrics.encode())

    def _info(self) -> dict[str, Any]:
        try:
            info = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):  # not there yet, or damaged: the next write makes it anew
            return {}
        return info if isinstance(info, dict) else {}


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
        given = load_checkpoint(source) | {"best": None, "metrics": ""}  # its best.pt and log stay in their folder
        check_trajectory(given, config, source)
        if is_finished(given, config):
            raise ConfigError(
                f"resume={source} is finished; to train it further: trainer.epochs=... and {_allow(['trainer.epochs'])}"
            )
        path = _folder_started_from(wanted, config.resume)
    else:
        raise ConfigError(f"resume={config.resume} must be auto, never, a run folder or a checkpoint; it is not there")
    path.mkdir(parents=True, exist_ok=True)
    _refuse_links(path)
    lock = _lock(path)
    try:
        checkpoints = Checkpoints(path / "checkpoints", config.trainer.keep_checkpoints)
        own = checkpoints.newest(warn)
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


def check_data(checkpoint: dict[str, Any], fingerprints: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to continue a checkpoint on other images than those it was trained with, but where the user allows it.

    Raises:
        ConfigError: what changed, by class.
    """
    saved = checkpoint["fingerprint"]
    found = [line for split in saved for line in differences(saved[split], fingerprints[split], split)]
    if not found:
        return
    changes = "\n".join(f"  {line}" for line in found)
    if "data.root" in config.allow_config_change:
        warn(f"the images are not those that this run began with:\n{changes}")
        return
    raise ConfigError(
        f"data.root={config.data.root}: the images are not those that this run began with:\n{changes}\n"
        "bring the old ones back, or start a new run (another run_name, or resume=never); to continue on these all the "
        f"same: {_allow(['data.root'])}"
    )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in code, packages and machine since a checkpoint, as far as it may show in the numbers."""
    lines = []
    if before.get("commit") != now["commit"]:
        lines.append(f"the code: commit {before.get('commit')} -> {now['commit']}")
    elif before.get("difference") != now.get("difference"):
        lines.append("the code: other changes that are not committed")
    versions = before.get("versions", {})
    lines += [f"{name}: {versions[name]} -> {v}" for name, v in now["versions"].items() if versions.get(name, v) != v]
    machine = [key for key in ("threads", "gpu") if before.get(key, now[key]) != now[key]]
    return lines + [f"{key}: {before[key]} -> {now[key]}" for key in machine]


def is_finished(checkpoint: dict[str, Any], config: TrainConfig) -> bool:
    """Finished under this very config; an allowed change (more epochs, say) trains it further."""
    return checkpoint["finished"] and not differing_keys(load_config(checkpoint["config"]), config)


def _allow(keys: list[str]) -> str:
    return f"allow_config_change=[{','.join(keys)}]"


def provenance(config: TrainConfig) -> dict[str, Any]:
    """What made this run: the command, code, packages and machine. `reproduce` is the command in full."""
    difference = _difference()
    return {
        "command": shlex.join(sys.argv),
        "reproduce": shlex.join(["sasa-train", *as_overrides(config)]),
        "seed": config.seed,
        "directory": os.getcwd(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(difference),
        "difference": f"changes-{_digest(difference)}.diff" if difference else None,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}
        | {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": _now(),
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


def _refuse_links(path: Path) -> None:
    """A run folder may come from a stranger: nothing in it may lead writes out of it."""
    folders = [path, *(path / name for name in ("checkpoints", "tensorboard", "profile"))]
    for entry in (entry for folder in folders if folder.is_dir() for entry in folder.iterdir()):
        if entry.is_symlink():
            raise ConfigError(
                f"{entry} is a symbolic link, and a run writes inside its folder alone: put there what it links to, "
                "or move the whole run with output_dir=..."
            )


def _lock(path: Path) -> IO[str]:
    """A lock that the operating system drops when this process ends, however it ends.

    POSIX's record lock, not flock: data workers, which may outlive a killed run by seconds, do not inherit it.
    """
    file = os.fdopen(os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ConfigError(f"{path} is in use by {_holder(file)}; wait for it, or use another run_name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be locked ({error.strerror}): use an output_dir on a disk that can") from None
    file.truncate(0)
    json.dump({"host": platform.node(), "process": os.getpid(), "started": _now()}, file)
    file.flush()
    return file


def _holder(file: IO[str]) -> str:
    try:
        holder = json.load(file)
        return f"process {holder['process']} on {holder['host']}, which started at {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another run"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def _difference() -> str:
    """What the checkout's tracked files differ in from its last commit."""
    return _git("diff", "HEAD") or ""


def _git(*arguments: str) -> str | None:
    """Of the checkout this code is in; None where it is in none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=True, timeout=10)
        return done.stdout.removesuffix("\n")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
