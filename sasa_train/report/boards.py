"""A folder that shows several runs in TensorBoard under the names of what differs between them."""

import contextlib
import os
import re
from pathlib import Path

from sasa_train.files import inside
from sasa_train.refusal import ConfigError
from sasa_train.report.rows import Report

FOLDER = "tensorboard"
MAX_BYTES = 150  # of a name; file systems allow 255


def link_boards(report: Report, folder: Path) -> Path | None:
    """Make `folder`/tensorboard with a link to each run's TensorBoard folder, and return it; None without runs.

    Raises:
        ConfigError: the folder cannot be written, or something other than a link is in the way.
    """
    links: dict[str, Path] = {}
    for row in report.rows:
        for seed, job in sorted(row.jobs.items()):
            if job.run_dir is not None and (job.run_dir / FOLDER).is_dir():
                links[_name(f"{row.label}, seed={seed}", links)] = (job.run_dir / FOLDER).resolve()
    if not links:
        return None
    boards = inside(folder, FOLDER)
    try:
        boards.mkdir(parents=True, exist_ok=True)
        for path in boards.iterdir():
            if path.is_symlink() and path.name not in links:
                path.unlink()
        for name, target in links.items():
            _link(boards / name, os.path.relpath(target, boards.resolve()))
    except OSError as error:
        raise ConfigError(f"{boards}: cannot be written ({error.strerror}); give another place with --out") from error
    return boards


def _link(path: Path, target: str) -> None:
    """Replace a link as a whole, so that a command that was killed leaves the old one or the new one."""
    aside = path.with_name(f".{os.getpid()}.aside")
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    aside.symlink_to(target)
    os.replace(aside, path)


def _name(text: str, taken: dict[str, Path]) -> str:
    """Return the text as a file name that no other run has."""
    name = re.sub(r"[^\w=,.+ -]+", "-", text).strip(". ")
    while len(name.encode()) > MAX_BYTES:
        name = name[: len(name) // 2] + name[len(name) // 2 + 1 :]
    number = next(i for i in range(1, len(taken) + 2) if (name if i == 1 else f"{name} {i}") not in taken)
    return name if number == 1 else f"{name} {number}"
