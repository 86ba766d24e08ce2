"""The provenance of a run: its command, code (including uncommitted changes), packages and machine."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sasa_train.config.compose import as_overrides
from sasa_train.config.keys import TrainConfig
from sasa_train.machine import now
from sasa_train.processes.ranks import local_world_size, world_size

PACKAGES = ("torchvision", "timm", "hydra-core", "omegaconf", "numpy", "sasa_train")


def provenance(config: TrainConfig) -> tuple[dict[str, Any], str]:
    """Return plain values for run.json and checkpoints, and the diff of the code against its last commit.

    `reproduce` is the complete command, even if the config came from presets, a sweep or a script.
    """
    difference = _git("diff", "HEAD", "--no-ext-diff", "--no-color", "--binary") or ""
    name = f"changes-{hashlib.sha256(difference.encode(errors='surrogateescape')).hexdigest()[:8]}.diff"
    made_by = {
        "command": shlex.join(sys.argv),
        "reproduce": shlex.join([*_launcher(), *as_overrides(config)]),
        "seed": config.seed,
        "directory": os.getcwd(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(difference),
        "difference": name if difference else None,
        "not_in_git": (_git("ls-files", "--others", "--exclude-standard", "--", ".") or "").splitlines(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}
        | {package: _version(package) for package in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": now(),
    }
    return made_by, difference


def _launcher() -> list[str]:
    if world_size() == 1:
        return ["sasa-train"]
    num_nodes = world_size() // local_world_size()
    counts = [f"--nnodes={num_nodes}", f"--nproc-per-node={local_world_size()}"]
    return ["torchrun", *counts, "-m", "sasa_train.train"]


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the changes since a checkpoint (in code, packages or machine) that may affect the results."""
    lines = []
    if before.get("commit") != now["commit"]:
        lines.append(f"the code: commit {before.get('commit')} -> {now['commit']}")
    elif before.get("difference") != now.get("difference"):
        lines.append("the code: other changes that are not committed")
    versions = before.get("versions", {})
    lines += [f"{name}: {versions[name]} -> {v}" for name, v in now["versions"].items() if versions.get(name, v) != v]
    machine = [key for key in ("threads", "gpu") if before.get(key, now[key]) != now[key]]
    lines += [f"{key}: {before[key]} -> {now[key]}" for key in machine]
    if (processes := before.get("world_size", 1)) != now["world_size"]:
        lines.append(
            f"processes: {processes} -> {now['world_size']}; the same images, but sums are added in another order, and "
            "each process's batch norm sees its own micro-batches"
        )
    return lines


def _git(*arguments: str) -> str | None:
    """Return the output of a git command run in this code's checkout, or None if the code is not in one."""
    # A virtual environment may be inside another project's checkout, so the output is used only if git tracks this
    # file.
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], arguments):
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command],
                capture_output=True, text=True, errors="surrogateescape", check=True, timeout=10,
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.removesuffix("\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
