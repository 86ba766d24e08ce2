"""Checkpoints that appear whole or not at all, and the newest good one.

`last.pt` is the newest; when the next one is written it becomes `step-<step>.pt`, of which the newest few are kept;
`best.pt` is a copy of its own. Each file is written aside, fsynced and renamed, so that a kill at any instruction
leaves a whole file behind. Of a checkpoint's content this module knows the names of the parts, no more.
"""

import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sasa_train.atomic import sync_folder, write_aside, write_atomic

REQUIRED = {"model", "ema", "optimizer", "step", "epoch", "config", "rng", "best", "classes", "finished"}


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


class Checkpoints:
    """The checkpoints of one run: `folder` holds them, `keep` step-numbered ones stay beside last and best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._last_step: int | None = None  # of last.pt, where that is known to be good

    def save(self, content: dict[str, Any], is_best: bool) -> None:
        """Write last.pt, and best.pt where `is_best`.

        Raises:
            CheckpointError: the files cannot be written (a full disk, say); the earlier ones are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        last = self.folder / "last.pt"
        try:
            if is_best:  # before last.pt, whose content says that there is a best
                write_atomic(self.folder / "best.pt", buffer.getbuffer())
            temporary = write_aside(last, buffer.getbuffer())
            if self.keep and self._last_step not in (None, content["step"]):
                os.replace(last, self.folder / f"step-{self._last_step:08d}.pt")
            os.replace(temporary, last)
            sync_folder(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot write a checkpoint of {buffer.tell() / 1e6:.0f} MB ({error.strerror}); the "
                "earlier ones are untouched. Make room and run the same command again"
            ) from error
        self._last_step = content["step"]
        for old in self.numbered()[self.keep :]:
            old.unlink()

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none at all; damaged ones go to `warn`.

        Raises:
            CheckpointError: there are checkpoints and none is good: a run never begins anew in silence.
        """
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()
        candidates = [self.folder / "last.pt", *self.numbered(), self.folder / "best.pt"]
        candidates = [path for path in candidates if path.exists()]
        for path in candidates:
            try:
                content = load_checkpoint(path)
            except CheckpointError as error:
                warn(f"skipping a damaged checkpoint: {error}")
                continue
            if path.name == "last.pt":
                self._last_step = content["step"]
            return content
        if candidates:
            raise CheckpointError(
                f"{self.folder}: none of its {len(candidates)} checkpoints can be read; restore one from a copy, or "
                "start a new run with resume=never"
            )
        return None

    def numbered(self) -> list[Path]:
        """step-<step>.pt, newest first."""
        found = ((re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in self.folder.glob("step-*.pt"))
        return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no code in it can run (`weights_only=True`).

    Raises:
        CheckpointError: the file is missing, truncated, altered (a checksum does not match) or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged, the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile's, torch's and pickle's errors have no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    lacking = REQUIRED - (content.keys() if isinstance(content, dict) else set())
    if lacking:
        raise CheckpointError(f"{path}: is no checkpoint of sasa_train (it lacks {', '.join(sorted(lacking))})")
    return content
