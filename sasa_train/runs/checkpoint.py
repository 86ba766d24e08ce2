"""Checkpoints: written whole or not at all, checked when they are read; the newest good one is found.

`last.pt` is the newest. When the next one is written, it becomes `step-<step>.pt`, of which the newest few are kept.
`best.pt` is a link to the file that was last when it was best. Beside each file lies its manifest, `last.pt.json` and
so on: size, SHA-256 and step. This module knows the names of a checkpoint's parts, no more.
"""

# Each file is written aside, synced to disk and renamed, so that a kill at any instruction leaves a whole file. The
# manifest comes last: a file without one (a kill came first, or it was copied alone) is judged by its own checksums.

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sasa_train.files import sync_folder, write_aside, write_atomic
from sasa_train.refusal import CheckpointError

FORMAT_VERSION = 2
# The parts of every checkpoint, and their types, so that no other program's file is mistaken for one.
REQUIRED = {
    "format_version": int, "model": dict, "ema": dict | None, "optimizer": dict, "step": int, "epoch": int,
    "config": str, "rng": dict, "best": dict | None, "classes": list, "finished": bool, "metrics": str,
    "fingerprint": dict, "provenance": dict,
}  # fmt: skip


class DamagedCheckpointError(CheckpointError):
    """The file is not what was written."""


class Checkpoints:
    """The checkpoints of one run in `folder`; `keep` step-numbered ones stay beside last and best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._last_step: int | None = None  # of last.pt, where it is known to be good

    def save(self, content: dict[str, Any], is_best: bool) -> None:
        """Write last.pt, and best.pt where `is_best`.

        Raises:
            CheckpointError: the files cannot be written (a full disk, say); the old last.pt is still there.
        """
        size = _num_bytes(content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > free:
                raise OSError(0, f"{free / 1e6:,.0f} MB are free")
            self._write(content, is_best)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot write a checkpoint of {size / 1e6:,.0f} MB ({error.strerror or error}); the "
                "earlier ones are untouched. Make room and run the same command again"
            ) from error

    def _write(self, content: dict[str, Any], is_best: bool) -> None:
        last, hashed = self.folder / "last.pt", _Hashed()
        temporary = write_aside(last, lambda file: hashed.save(content | {"format_version": FORMAT_VERSION}, file))
        described = {"step": content["step"], "size": temporary.stat().st_size, "sha256": hashed.digest.hexdigest()}
        manifest = json.dumps(described | {"format_version": FORMAT_VERSION}).encode()
        try:
            # best.pt is a link, which costs neither time nor room. It comes before last.pt, whose content says that
            # there is a best.
            if is_best:
                _put(_linked(temporary, self.folder / "best.pt"), self.folder / "best.pt", manifest)
            if self.keep and self._last_step not in (None, content["step"]):
                numbered = self.folder / f"step-{self._last_step:08d}.pt"
                _put(_linked(last, numbered), numbered, bytes_of(manifest_of(last)))
            self._last_step = None  # until it is there
            _put(temporary, last, manifest)
            self._last_step = content["step"]
        finally:
            temporary.unlink(missing_ok=True)
        for old in self.numbered()[self.keep :]:
            manifest_of(old).unlink(missing_ok=True)
            old.unlink()

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest checkpoint that can be read, or None where there never was one.

        Damaged ones go to `warn` and get the ending .damaged, so that they are neither tried nor counted again.

        Raises:
            CheckpointError: there are or were checkpoints and none is good, or one cannot be read now.
        """
        # A run never begins anew in silence. And a disk that fails may come back, so that is not taken for damage.
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()
        left = sorted(path.name for path in self.folder.glob("*.pt*"))  # manifests and damaged ones too
        for path in self._candidates():
            try:
                content = load_checkpoint(path)
            except DamagedCheckpointError as error:
                warn(f"skipping a damaged checkpoint: {error}")
                _put(path, path.with_name(f"{path.name}.damaged"), bytes_of(manifest_of(path)))
                manifest_of(path).unlink(missing_ok=True)
                continue
            if path.name == "last.pt":
                self._last_step = content["step"]
            else:
                warn(f"going on from {path}, step {content['step']}, the newest good one")
            return content
        if left:
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints can be read ({', '.join(left)}); restore one from a copy, or "
                "start a new run with resume=never"
            )
        return None

    def _candidates(self) -> list[Path]:
        """List the files, newest first, as far as manifests and names tell the step."""
        steps = {self.folder / "best.pt": -1} | {path: int(path.stem[5:]) for path in reversed(self.numbered())}
        steps[self.folder / "last.pt"] = sys.maxsize
        for path in steps:
            with contextlib.suppress(ValueError):
                steps[path] = _parse_manifest(bytes_of(manifest_of(path)) or b"")["step"]
        newest_last = sorted(steps, key=lambda path: steps[path])  # last.pt comes last among equal steps
        return [path for path in reversed(newest_last) if path.exists()]

    def numbered(self) -> list[Path]:
        """List step-<step>.pt, newest first."""
        found = ((re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in self.folder.glob("step-*.pt"))
        return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def manifest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no code in it can run (`weights_only=True`).

    Raises:
        DamagedCheckpointError: the file is truncated, altered (not what its manifest or its own checksums say) or not
            a checkpoint.
        CheckpointError: it is missing or cannot be read now, or its format is unknown to this version.
    """
    content = _read(path)
    content = content if isinstance(content, dict) else {}
    version = content.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {version}, and this sasa_train reads format {FORMAT_VERSION}: go on with the version "
            "that wrote it (its run.json names the commit), or start a new run with resume=never"
        )
    if wrong := [key for key, kind in REQUIRED.items() if key not in content or not _is(content[key], kind)]:
        raise DamagedCheckpointError(
            f"{path}: is not a checkpoint of sasa_train (wrong or missing: {', '.join(wrong)})"
        )
    return content


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _read(path: Path) -> Any:
    """Return the file's content, checked."""
    # A run may put its next checkpoint there between the manifest and the file: then the manifest has changed too, and
    # both are read once more.
    while True:
        manifest = bytes_of(manifest_of(path))
        try:
            with path.open("rb") as file:
                check_content(file, manifest)
                return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # zipfile's, torch's and pickle's errors have no common class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            # EINVAL means damage: zipfile seeks before the start of a file that is too short.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
            if manifest == bytes_of(manifest_of(path)):
                raise DamagedCheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error


def check_content(file: BufferedReader, manifest: bytes | None) -> None:
    """Raise ValueError where the file is not what its manifest says or, without one, its own checksums."""
    if manifest is not None:
        described = _parse_manifest(manifest)
        found = os.fstat(file.fileno()).st_size
        if found != described["size"]:
            raise ValueError(f"truncated or altered: {found:,} bytes instead of {described['size']:,}")
        if hashlib.file_digest(file, "sha256").hexdigest() != described["sha256"]:
            raise ValueError("altered: its SHA-256 is not the manifest's")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed, which no checkpoint is: it could grow without limit")
        # torch.load does not look at the checksums.
        damaged = archive.testzip() if manifest is None else None
    if damaged is not None:
        raise ValueError(f"damaged: the checksum of {damaged} does not match")
    file.seek(0)


def _parse_manifest(manifest: bytes) -> dict[str, Any]:
    """Return its step, size and sha256; raise ValueError where it has none."""
    try:
        parsed = json.loads(manifest)
        return {"step": int(parsed["step"]), "size": int(parsed["size"]), "sha256": str(parsed["sha256"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("its manifest is damaged") from error


def bytes_of(path: Path) -> bytes | None:
    """Return the file's content, or None where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


class _Hashed:
    """A file for torch.save that computes the SHA-256 of what is written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._error: OSError | None = None

    def save(self, content: dict[str, Any], file: BinaryIO) -> None:
        self._file = file
        try:
            torch.save(content, self)  # type: ignore[arg-type]  # it asks for write and flush alone
        # Where a write fails, torch raises its own error about a wrong position: ours says what happened.
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: memoryview) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _put(temporary: Path, path: Path, manifest: bytes | None) -> None:
    """Rename a file, then write its manifest."""
    # The old manifest goes first: it must never lie beside a file that it does not describe.
    manifest_of(path).unlink(missing_ok=True)
    os.replace(temporary, path)
    sync_folder(path.parent)
    if manifest is not None:
        write_atomic(manifest_of(path), manifest)


def _linked(path: Path, beside: Path) -> Path:
    """Give the file another name, ready to be renamed to `beside`; copy it where the file system has no links."""
    linked = beside.with_name(f"{beside.name}.{os.urandom(4).hex()}.tmp")
    try:
        os.link(path, linked)
    except OSError:
        with path.open("rb") as source:
            return write_aside(beside, lambda file: shutil.copyfileobj(source, file, 2**22))
    return linked


def _num_bytes(content: Any) -> int:
    """Return the bytes of all tensors and texts: a checkpoint's size but for a few KB."""
    if isinstance(content, dict | list | tuple):
        return sum(map(_num_bytes, content.values() if isinstance(content, dict) else content))
    return content.nbytes if isinstance(content, torch.Tensor) else len(content) if isinstance(content, str) else 0


def find_checkpoint(source: Path) -> Path:
    """Return a checkpoint file itself, or a run folder's best.pt, or its last.pt."""
    if not os.path.isdir(source):  # also for a name that no file system takes
        return source
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    return folder / "best.pt" if (folder / "best.pt").exists() else folder / "last.pt"
