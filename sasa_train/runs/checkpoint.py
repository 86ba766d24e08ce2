"""Checkpoints, which are written atomically and verified on reading; damaged ones are skipped when a run resumes.

`last.pt` is the newest. When the next one is written, the old `last.pt` becomes `step-<step>.pt`; the newest few of
these are kept. `best.pt` is a hard link to the checkpoint with the best evaluation. Each file has a manifest with its
size, SHA-256 and step, such as `last.pt.json`. `SCHEMA` lists the entries of a checkpoint.
"""

# Each file is written under a temporary name, synced to disk and renamed, so that a kill at any instruction leaves a
# complete file. The manifest is written last; a file without one (because of a kill, or because it was copied without
# it) is verified with its own checksums.

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sasa_train.data.class_names import MAX_CLASS_NAME
from sasa_train.data.fingerprint import SOURCES
from sasa_train.files import (
    discard,
    is_there,
    open_regular,
    read_regular,
    sync_folder,
    unfinished,
    write_aside,
    write_atomic,
)
from sasa_train.machine import is_out_of_memory
from sasa_train.refusal import DISK_FAILED, DISK_FULL, CheckpointError, ConfigError, causes, shorten
from sasa_train.runs.metrics import is_log, parse_log
from sasa_train.runs.schema import (
    MAX_PARTS,
    MAX_SECONDS,
    PLAIN,
    TEXT,
    TRACKER_ID,
    Maybe,
    Rule,
    consists_of,
    first_wrong,
    is_plain,
    number,
    text,
    whole,
)  # fmt: skip
from sasa_train.terminal import printable

FORMAT_VERSION = 2
COUNT = whole(0)


def is_dense(value: Any) -> bool:
    """Return whether a value is a tensor that a model could load: real, in memory, not sparse and not quantized."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta or value.is_complex())
    )


def _is_stored(value: Any) -> bool:
    # A tensor with strides of 0 is larger than its storage, without limit.
    return is_dense(value) and value.nbytes <= value.untyped_storage().nbytes()


def _is_content(value: Any) -> bool:
    return _is_stored(value) or is_plain(value) or isinstance(value, torch.dtype)  # adafactorbv keeps a dtype


TENSOR = Rule("a dense tensor of real numbers", _is_stored)
CONTENT = Rule("tensors, texts, numbers, lists and dicts of them", lambda value: consists_of(value, _is_content))
NAME = text(MAX_CLASS_NAME)
SUMS = Rule(
    "finite float64 [2] or [W, 2]",
    lambda sums: (
        _is_stored(sums) and sums.dtype == torch.float64 and sums.shape[-1:] == (2,) and bool(sums.isfinite().all())
    ),
)
BYTES = Rule("uint8 [N]", lambda state: is_dense(state) and state.dtype == torch.uint8 and state.ndim == 1)
IMAGES = {  # see data/fingerprint.py
    "source": Rule(f"one of {', '.join(SOURCES)}", lambda source: isinstance(source, str) and source in SOURCES),
    "labels": TEXT,
    "classes": [
        {"name": NAME, "names": TEXT, "content": TEXT, "num_images": COUNT, "num_read": COUNT, "num_unreadable": COUNT}
    ],
}
# All that is read from a checkpoint anywhere, so that a file which is whole but wrong is refused here. The config is
# checked when it is loaded, and the tensors when a model and an optimizer load them.
SCHEMA = {
    "format_version": Rule(str(FORMAT_VERSION), lambda version: type(version) is int and version == FORMAT_VERSION),
    "model": {str: TENSOR},
    "ema": (None, {str: TENSOR}),
    "optimizer": {"state": CONTENT, "param_groups": [{str: CONTENT}]},
    "scaler": {
        "scale": Maybe(number(1e-38, 3.5e38)),
        "growth_factor": Maybe(number(1, 1e38)),
        "backoff_factor": Maybe(number(1e-30, 1)),
        "growth_interval": Maybe(whole(1, 2**31 - 1)),
        "_growth_tracker": Maybe(whole(0, 2**31 - 1)),
    },
    "window": {"sums": SUMS, "num_images": (COUNT, [COUNT])},
    "step": COUNT,
    "epoch": COUNT,
    "evaluated_step": COUNT,
    "best": (None, {"top1": number(0, 100), "step": COUNT, "epoch": COUNT, str: PLAIN}),
    "seconds": number(0, MAX_SECONDS),
    "rng": {"torch": BYTES, "cuda": (None, BYTES)},
    "config": TEXT,
    "classes": [NAME],
    "finished": bool,
    "metrics": Rule("rows of metrics.jsonl", is_log),
    "best_sha256": Maybe((None, TEXT)),  # of best.pt; null: this is the same file
    "fingerprint": {"train": IMAGES, "val": IMAGES},
    "provenance": {
        "world_size": Maybe(whole(1)),
        "versions": Maybe({str: (None, TEXT)}),
        "imports": Maybe({str: TEXT}),
        "tracker_id": Maybe(TRACKER_ID),
        "teacher_sha256": Maybe((None, TEXT)),
        "pretrained_sha256": Maybe((None, TEXT)),
        str: PLAIN,
    },
    str: CONTENT,
}


class DamagedCheckpointError(CheckpointError):
    """Raised if a file differs from what was written."""


class Checkpoints:
    """The checkpoints of one run in `folder`: last.pt, best.pt and the newest `keep` step-numbered ones."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._last_step: int | None = None  # of last.pt, if it is known to be intact
        self._best_sha256: str | None = None  # of the best.pt that this run wrote, if it is known

    def save(self, content: dict[str, Any], is_best: bool) -> None:
        """Write last.pt, and also best.pt if `is_best` is true.

        Raises:
            CheckpointError: the files cannot be written (for example, on a full disk); the old ones are kept, both of
                them.
        """
        size = _num_bytes(content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in unfinished(self.folder):  # left behind by a save that could not delete them
                discard(stale)
            free = shutil.disk_usage(self.folder).free
            if size > free:
                raise OSError(0, f"{free / 1e6:,.0f} MB are free")
            self._write(content, is_best)
        except OSError as error:
            remedy = "Make room" if error.errno in (0, *DISK_FULL) else "Mend this"
            raise CheckpointError(
                f"{self.folder}: cannot write a checkpoint of {size / 1e6:,.0f} MB ({error.strerror or error}); the "
                f"earlier ones are untouched. {remedy} and run the same command again"
            ) from error

    def _write(self, content: dict[str, Any], is_best: bool) -> None:
        last, hashed = self.folder / "last.pt", _Hashed()
        added: dict[str, Any] = {"format_version": FORMAT_VERSION}
        if is_best or self._best_sha256 is not None:
            added["best_sha256"] = None if is_best else self._best_sha256  # no file contains its own
        temporary = write_aside(last, lambda file: hashed.save(content | added, file))
        described = {"step": content["step"], "size": temporary.stat().st_size, "sha256": hashed.digest.hexdigest()}
        manifest = json.dumps(described | {"format_version": FORMAT_VERSION}).encode()
        best, last_step = self.folder / "best.pt", self._last_step
        self._last_step = None  # unknown until the new last.pt is in place
        try:
            if self.keep and last_step not in (None, content["step"]):
                numbered = self.folder / f"step-{last_step:08d}.pt"
                of_last = _manifest_bytes(last)
                _put(_linked(last, numbered), numbered, of_last)
            with _all_or_none([best, last] if is_best else [last]):
                # best.pt is a link, which takes neither time nor disk space. It is written before last.pt, whose
                # content states that a best checkpoint exists.
                if is_best:
                    _put(_linked(temporary, best), best, manifest)
                _put(temporary, last, manifest)
            self._last_step = content["step"]
            self._best_sha256 = described["sha256"] if is_best else self._best_sha256
        finally:
            discard(temporary)
        # The new files are in place, so a folder that cannot be listed is no failure.
        with contextlib.suppress(OSError):
            for old in self.numbered()[self.keep :]:
                discard(manifest_of(old))
                discard(old)

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest checkpoint that can be read, or None if there has never been one.

        Damaged checkpoints are reported through `warn` and given the suffix .damaged, so that they are not tried again.

        Raises:
            CheckpointError: there are or were checkpoints but none is intact, or one is temporarily unreadable.
        """
        # A run must never silently start over. A disk error may be temporary and is not treated as damage.
        for stale in unfinished(self.folder):
            stale.unlink()
        left = sorted(path.name for path in self.folder.glob("*.pt*"))  # including manifests and damaged checkpoints
        for path in self._candidates():
            try:
                content = load_checkpoint(path)
            except DamagedCheckpointError as error:
                warn(f"skipping a damaged checkpoint: {error}")
                damaged = path.with_name(f"{path.name}.damaged")
                _put(path, damaged, None)
                with contextlib.suppress(FileNotFoundError):
                    os.replace(manifest_of(path), manifest_of(damaged))
                continue
            self._best_sha256 = _sha256_of_best(content, path)
            if path.name == "last.pt":
                self._last_step = content["step"]
            else:
                warn(f"going on from {path}, step {content['step']}, the newest good one")
                self._make_last(path)
            return content
        if left:
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints can be read ({', '.join(left)}); restore one from a copy, or "
                "start a new run with resume=never"
            )
        return None

    def _make_last(self, path: Path) -> None:
        """Put a checkpoint in the place of last.pt, which other commands read, if the disk allows it now."""
        last = self.folder / "last.pt"
        with contextlib.suppress(OSError):
            manifest = _manifest_bytes(path)
            _put(_linked(path, last), last, manifest)

    def other_best(self, best: dict[str, Any] | None, step: int, evaluated_step: int) -> str | None:
        """Say that best.pt is not the one that a run, now at `step`, wrote for `best`; return None if it may be.

        evaluated_step: the step of the run's last evaluation, which another of the same step may follow.

        Raises:
            ConfigError: there is a best.pt, but `best` is None.
        """
        path = self.folder / "best.pt"
        there = sha256 = None
        with contextlib.suppress(ValueError):
            if manifest := _manifest_bytes(path):
                there, sha256 = (_parse_manifest(manifest)[key] for key in ("step", "sha256"))
        if there is None and is_there(path):
            there, sha256 = _step_and_sha256(path)
        # A kill came between best.pt and last.pt, in the save that followed the evaluation of that step.
        if there is not None and (there > step or there == step > evaluated_step):
            return None
        if best is None and there is not None:
            raise ConfigError(
                f"{path} is there, of step {there}, but last.pt has best=None; bring back the one that the run wrote"
            )
        is_same = there is None or (there == (best and best["step"]) and self._best_sha256 in (None, sha256))
        if best is None or (is_there(path) and is_same):
            return None
        of_other = "its SHA-256 is another" if there == best["step"] else f"it is of step {there}"
        of_other = "it cannot be read as a checkpoint" if there == -1 else of_other
        found = of_other if is_there(path) else "it is gone"
        return f"{path} is not the one of step {best['step']} that this run wrote: {found}; bring it back from a copy"

    def _candidates(self) -> list[Path]:
        """List the checkpoint files, newest first, by the steps in them or, if damaged, in their manifests or names."""
        steps = {self.folder / "best.pt": -1} | {path: int(path.stem[5:]) for path in reversed(self.numbered())}
        steps[self.folder / "last.pt"] = sys.maxsize
        for path in steps:
            # A manifest with a wrong step would have an older checkpoint take the place of last.pt.
            content = _unverified(path, {"step": COUNT})
            with contextlib.suppress(ValueError):
                steps[path] = (content or _parse_manifest(bytes_of(manifest_of(path)) or b""))["step"]
        newest_last = sorted(steps, key=lambda path: steps[path])  # at equal steps, last.pt sorts last
        return [path for path in reversed(newest_last) if is_there(path)]

    def numbered(self) -> list[Path]:
        """List the step-<step>.pt files, newest first."""
        found = ((re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in self.folder.glob("step-*.pt"))
        return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def _step_and_sha256(path: Path) -> tuple[int, str]:
    """Return the step and the SHA-256 of a checkpoint without a manifest; step -1 if it cannot be read as one."""
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(CheckpointError):
        return load_checkpoint(path)["step"], sha256
    return -1, sha256


def manifest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU without executing any code in it (`weights_only=True`).

    Raises:
        DamagedCheckpointError: the file is truncated, altered (it does not match its manifest or its own checksums) or
            not a checkpoint, or one of its entries has another type or range than this module writes.
        CheckpointError: the file is missing or cannot be read, this version does not know its format, or PyTorch
            cannot load it although it matches its manifest.
    """
    content = _read(path)
    content = content if isinstance(content, dict) else {}
    version = content.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {version}, and this sasa_train reads format {FORMAT_VERSION}: go on with the version "
            "that wrote it (its run.json names the commit), or start a new run with resume=never"
        )
    if wrong := first_wrong(content, SCHEMA) or _first_contradiction(content) or _first_excess(content):
        raise DamagedCheckpointError(f"{path}: is not a checkpoint of sasa_train ({wrong})")
    return content


def _first_excess(content: dict[str, Any]) -> str | None:
    """Say that the content would take much more time or memory than the file has bytes, or return None."""
    try:
        tensors = list(filter(is_dense, _parts(content)))
    except ValueError as error:
        return str(error)
    stored = sum({(storage := x.untyped_storage()).data_ptr(): storage.nbytes() for x in tensors}.values())
    # An optimizer loads its state in its parameters' dtype. Layers may share weights, and weights may be bfloat16.
    loaded = sum(x.numel() * max(x.itemsize, 4) for x in tensors)
    if loaded <= 4 * stored + 2**24:
        return None
    return f"its tensors are {loaded:,} bytes when loaded, and share {stored:,} bytes in the file"


def _parts(content: Any) -> Iterator[Any]:
    """Yield what a checkpoint's lists and dicts hold, at any depth.

    Raises:
        ValueError: they hold too much: a list may contain itself, or the same list again and again.
    """
    left, num_parts = [content], 0
    while left:
        num_parts += 1
        if num_parts + len(left) > 10 * MAX_PARTS:
            raise ValueError(f"it has more than {10 * MAX_PARTS:,} parts")
        part = left.pop()
        if isinstance(part, dict | list | tuple):
            left += part.values() if isinstance(part, dict) else part
        else:
            yield part


def _sha256_of_best(content: dict[str, Any], path: Path) -> str | None:
    """Return the SHA-256 of the best.pt that the run of a checkpoint, which is the file at `path`, wrote, or None.

    It is unknown if an older version wrote the checkpoint, or the manifest that states it is not there.
    """
    if content.get("best_sha256", "") is not None:
        return content.get("best_sha256")
    with contextlib.suppress(ValueError):
        return _parse_manifest(bytes_of(manifest_of(path)) or b"")["sha256"]
    return None


def other_than_best(path: Path) -> str | None:
    """Say that a best.pt is not the one that the last.pt beside it records, or return None if it may be.

    last.pt is not verified, so that this takes no time; if it cannot be read, nothing is said.
    """
    last = path.with_name("last.pt")
    if path.name != "best.pt":
        return None
    while True:
        manifests = [bytes_of(manifest_of(each)) for each in (path, last)]
        content = _unverified(last, {key: SCHEMA[key] for key in ("step", "evaluated_step", "best", "best_sha256")})
        if content is None or not content["best"]:
            return None
        checkpoints = Checkpoints(path.parent, 0)
        checkpoints._best_sha256 = _sha256_of_best(content, last)
        try:
            other = checkpoints.other_best(content["best"], content["step"], content["evaluated_step"])
        except OSError as error:
            manifest = error.filename or manifest_of(path)
            return f"{manifest}: cannot be read ({error.strerror}), so that {path} may be another"
        if other is None:
            return None
        if [bytes_of(manifest_of(each)) for each in (path, last)] == manifests:  # otherwise, they were just replaced
            return other


def _unverified(path: Path, schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of a checkpoint, its tensors unread, or None if it is damaged or has other entries."""
    try:
        with open_regular(path) as file:
            _check_stored(file)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception:  # as in `_read`, which says what is wrong with it
        return None
    return None if first_wrong(content, schema) else content


LARGEST = 3.5e38  # a loss is a float32


def _first_contradiction(content: dict[str, Any]) -> str | None:
    """Describe the first entry that does not go with the others, or return None."""
    counts, sums = content["window"]["num_images"], content["window"]["sums"]
    is_one = isinstance(counts, int)
    if sums.numel() != 2 * (1 if is_one else len(counts)):
        return f"window.sums has shape {list(sums.shape)}, and must have one row per number in window.num_images"
    for (loss, hits), num_images in zip(sums.reshape(-1, 2).tolist(), [counts] if is_one else counts, strict=True):
        if not 0 <= hits <= num_images or abs(loss) > LARGEST * num_images:
            return f"window.sums has loss {loss:g} and {hits:g} hits, and num_images={num_images} cannot have them"
    numbers = [number for group in content["optimizer"]["param_groups"] for number in _listed(group.get("params"))]
    if not all(type(number) is int for number in numbers) or numbers != list(range(len(numbers))):
        return f"optimizer.param_groups has params={shorten(numbers)}, and must number them 0, 1, 2, ..."
    for key in ("epoch", "evaluated_step"):
        if content[key] > content["step"]:
            return f"{key}={content[key]} must be at most step={content['step']}"
    for split in ("train", "val"):
        names = [entry["name"] for entry in content["fingerprint"][split]["classes"]]
        if content["classes"] != names:
            shown, theirs = shorten(content["classes"][:50]), shorten(names[:50])
            return f"classes={shown} must be fingerprint.{split}'s names {theirs}"
    return _first_wrong_row(content) if content["classes"] else "classes=[] must have at least one name"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first_wrong_row(content: dict[str, Any]) -> str | None:
    """Describe how the metrics contradict the steps of a checkpoint, or return None."""
    rows, best, evaluated = parse_log(content["metrics"]), content["best"], content["evaluated_step"]
    val = {row["step"]: row for row in rows if row["split"] == "val"}
    if (last := max((row["step"] for row in rows), default=0)) > content["step"]:
        return f"metrics has a row of step {last}, and step={content['step']} must be the last"
    # After the last step of an epoch, the train row precedes the val row.
    for before, row in pairwise((row["step"], row["split"]) for row in rows):
        if before >= row:
            return f"metrics has the {row[1]} row of step {row[0]} after the {before[1]} row of step {before[0]}"
    # The metrics of a run that began from a checkpoint start after it, so its last evaluation may have no row.
    if evaluated != max(val, default=evaluated) or (evaluated not in val and any(r["step"] <= evaluated for r in rows)):
        return f"evaluated_step={evaluated} must be the step of the last val row in metrics"
    if best is None:
        return None
    for key in best:
        if best["step"] not in val or val[best["step"]].get(key) != best[key]:
            return f"best (step {best['step']}, {key} {shorten(best[key])}) must be a val row in metrics"
    return None


def first_misfit(model: nn.Module, tensors: dict[str, Tensor]) -> str | None:
    """Describe the first of a checkpoint's tensors that a run with this model cannot have written, or return None.

    The model may be on the meta device, so that a checkpoint cannot demand more memory than it takes itself.
    """
    own, others = model.state_dict(), []
    for name, ours in own.items():
        if (found := tensors.get(name)) is None:
            others.append(f"{name} is missing")
        elif found.shape != ours.shape:
            others.append(f"{name} has shape {[*found.shape]}, and must have {[*ours.shape]}")
        elif found.dtype != ours.dtype:  # loading converts it: weights of whole numbers have lost their fractions
            others.append(f"{name} is {found.dtype}, and must be {ours.dtype}")
    others += [f"{printable(shorten(name))} is not in the model" for name in tensors if name not in own]
    if others:
        return others[0] + (f", and {len(others) - 1} more like it" if len(others) > 1 else "")
    for name, found in tensors.items():
        # Neither is ever saved: a run stops before it, and a variance is a mean of squares.
        if not found.isfinite().all():
            return f"{name} is not finite"
        if name.endswith("running_var") and (found < 0).any():
            return f"{name} has negative variances"
        if name.endswith("num_batches_tracked") and (found < 0).any():
            return f"{name} is a negative number of batches"
    return None


def _read(path: Path) -> Any:
    """Verify the file and return its content."""
    # A run may replace the checkpoint after the manifest was read and before the file is opened. In that case the
    # manifest has changed too, and both are read again.
    while True:
        manifest, is_as_saved = None, False
        try:
            manifest = bytes_of(manifest_of(path), may_fail=False)
            with open_regular(path) as file:
                check_content(file, manifest)
                is_as_saved = manifest is not None
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # errors of zipfile, torch and pickle have no common base class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if is_out_of_memory(error):
                raise CheckpointError(f"{path}: cannot be read, as memory ran out ({reason}); free some") from error
            # EINVAL means damage, because zipfile seeks before the start of a file that is too short. zipfile and torch
            # report a failed read as an error of their own.
            for cause in causes(error):
                if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
                    raise CheckpointError(f"{path}: cannot be read ({cause.strerror})") from error
            if is_as_saved:
                raise CheckpointError(
                    f"{path}: is undamaged, but PyTorch {torch.__version__} cannot load it here ({reason}); mend this, "
                    "or move the file away to go on from an earlier one"
                ) from error
            if manifest == bytes_of(manifest_of(path)):
                raise DamagedCheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error


def check_content(file: BufferedReader, manifest: bytes | None) -> None:
    """Raise ValueError if the file does not match its manifest or, without a manifest, its own checksums."""
    if manifest is not None:
        described = _parse_manifest(manifest)
        found = os.fstat(file.fileno()).st_size
        if found != described["size"]:
            raise ValueError(f"truncated or altered: {found:,} bytes instead of {described['size']:,}")
        if hashlib.file_digest(file, "sha256").hexdigest() != described["sha256"]:
            raise ValueError("altered: its SHA-256 is not the manifest's")
    file.seek(0)
    _check_stored(file, with_checksums=manifest is None)  # torch.load does not verify them
    file.seek(0)


def _check_stored(file: BufferedReader, with_checksums: bool = False) -> None:
    """Raise ValueError if parts of the file are compressed or, with `with_checksums`, damaged."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed, which no checkpoint is: it could grow without limit")
        damaged = archive.testzip() if with_checksums else None
    if damaged is not None:
        raise ValueError(f"damaged: the checksum of {damaged} does not match")


def _parse_manifest(manifest: bytes) -> dict[str, Any]:
    """Return a manifest, which has step, size and sha256; raise ValueError if any of them is missing or wrong."""
    try:
        parsed = json.loads(manifest)
        wrong = first_wrong(parsed, {"step": COUNT, "size": COUNT, "sha256": str})
    except (ValueError, RecursionError) as error:
        raise ValueError("its manifest is damaged") from error
    if wrong:
        raise ValueError(f"its manifest is damaged: {wrong}")
    return parsed


def bytes_of(path: Path, may_fail: bool = True) -> bytes | None:
    """Return the file's content, or None if it cannot be read; unless `may_fail`, raise OSError if the disk fails."""
    try:
        return read_regular(path)
    except OSError as error:
        if not may_fail and error.errno in DISK_FAILED:
            raise
        return None


def _manifest_bytes(path: Path) -> bytes | None:
    """Return the content of a checkpoint's manifest, or None if there is none; raise OSError if it cannot be read."""
    try:
        return read_regular(manifest_of(path))
    except FileNotFoundError:
        return None


class _Hashed:
    """A file object for torch.save that computes the SHA-256 of the data written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._error: OSError | None = None

    def save(self, content: dict[str, Any], file: BinaryIO) -> None:
        self._file = file
        try:
            torch.save(content, self)  # type: ignore[arg-type]  # it only calls write and flush
        # If a write fails, torch raises a misleading error about a wrong position, so the original error is raised.
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
    """Rename `temporary` to `path`, then write the manifest."""
    # The old manifest is removed first, because it must never accompany a file that it does not describe.
    manifest_of(path).unlink(missing_ok=True)
    os.replace(temporary, path)
    try:
        sync_folder(path.parent)
    finally:  # a file without its manifest could not be told from an altered one
        if manifest is not None:
            write_atomic(manifest_of(path), manifest)


@contextlib.contextmanager
def _all_or_none(paths: list[Path]) -> Iterator[None]:
    """If the block fails, restore these files and their manifests, so that a run never has a best.pt it disowned."""
    kept: list[tuple[Path, Path | None, bytes | None]] = []
    try:
        for path in paths:
            manifest = _manifest_bytes(path)
            kept.append((path, _linked(path, path) if is_there(path) else None, manifest))
        yield
    except BaseException as error:
        lost = []
        for path, link, manifest in kept:
            try:
                if link is None:
                    manifest_of(path).unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
                elif not os.path.exists(path) or not path.samefile(link) or bytes_of(manifest_of(path)) != manifest:
                    _put(link, path, manifest)
            except OSError as another:
                try:
                    is_back = _is_back(path, link) and bytes_of(manifest_of(path), may_fail=False) == manifest
                except OSError:  # the disk is gone
                    is_back = False
                if not is_back:
                    lost.append(f"{path} ({another.strerror})")
        if lost:
            raise CheckpointError(
                f"a save failed ({error}), and what it had replaced cannot be put back: {', '.join(lost)}. Look at the "
                "disk; the same command then goes on from the newest intact checkpoint"
            ) from error
        raise
    finally:
        for _, link, _ in kept:
            if link is not None:
                discard(link)


def _is_back(path: Path, link: Path | None) -> bool:
    """Return whether a file is the one that was kept as `link`, which a restore renames to it."""
    if link is None or not os.path.exists(path):
        return link is None and not os.path.exists(path)
    return not os.path.exists(link) or path.samefile(link) or filecmp.cmp(path, link, shallow=False)


def _linked(path: Path, beside: Path) -> Path:
    """Create a hard link to the file (or a copy, if links are unsupported), ready to be renamed to `beside`."""
    linked = beside.with_name(f"{beside.name}.{os.urandom(4).hex()}.tmp")
    try:
        os.link(path, linked)
    except OSError:
        with open_regular(path) as source:
            return write_aside(beside, lambda file: shutil.copyfileobj(source, file, 2**22))
    return linked


def _num_bytes(content: Any) -> int:
    """Return the total size in bytes of all tensors and strings, which is within a few KB of the checkpoint's size."""
    parts = list(_parts(content))
    num_of_tensors = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return num_of_tensors + sum(len(part) for part in parts if isinstance(part, str))
