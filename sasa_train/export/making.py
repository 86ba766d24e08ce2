"""Export one format to a temporary folder, and move the result into place only after verification."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from sasa_train.export.checking import ROUNDING, Measured, Run, measure
from sasa_train.export.formats import Format, Source
from sasa_train.files import kind, sync_folder

ASIDE, OLD = ".making-", ".old"  # prefix and suffix of folder names


class ExportError(Exception):
    """Raised if a format cannot be written or its logits differ from PyTorch's; no partial files are left."""


def sweep(folder: Path) -> None:
    """Delete the files left by a killed export, after restoring the old target folders that it had moved aside."""
    for aside in folder.glob(f"{ASIDE}*"):
        if kind(aside) != "a folder":  # not of an export, and perhaps a link to files elsewhere
            continue
        for old in aside.glob(f"*{OLD}"):
            if not (folder / old.stem).exists():
                os.replace(old, folder / old.stem)
        shutil.rmtree(aside)


def make(how: Format, source: Source, folder: Path, images: Tensor, expected: Measured) -> Measured:
    """Write `folder`/`how.target` or raise ExportError; the old target is kept until the new one is verified."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=ASIDE) as aside:
            path = Path(aside) / how.target
            found = _make_aside(how, source, path, images)
            difference = found.difference(expected)
            if not difference <= ROUNDING:  # also true if it is NaN
                by = f"{difference:.1e} of the largest, where {ROUNDING:.0e} is allowed"
                raise ExportError(f"its logits differ from PyTorch's by {by}; it is not written")
            _put(path, folder / how.target)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"cannot be written to {folder} ({reason}); give another place with --out") from error
    return found


def _make_aside(how: Format, source: Source, path: Path, images: Tensor) -> Measured:
    try:
        how.write(source, path)
        if len(list(path.parent.iterdir())) > 1:  # ONNX models above 2 GB; only one file is moved into place
            raise RuntimeError("it does not fit into one file")
        run = how.load(path)
        if how.has_weights and not _has_weights_of(source.trained.model, run):
            raise ExportError("its weights differ from the checkpoint's; it is not written")
        return measure(run, images)
    except (OSError, ExportError):
        raise
    except Exception as error:  # errors of torch's exporters, onnxruntime and timm have no common base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = source.trained.config.model.title
        raise ExportError(f"cannot be made of {name} ({reason}); leave it out with --formats") from error


def _has_weights_of(model: nn.Module, run: Run) -> bool:
    """Return whether a loaded model has bit for bit the same weights and buffers as `model`."""
    expected, found = model.state_dict(), run.state_dict() if isinstance(run, nn.Module) else {}
    return expected.keys() == found.keys() and all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def _put(path: Path, target: Path) -> None:
    """Sync `path` and rename it to `target`; an old target folder is moved aside and deleted with the temporary one."""
    for file in _files(path):
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if target.is_dir():
        os.replace(target, path.with_name(f"{path.name}{OLD}"))
    os.replace(path, target)
    sync_folder(target.parent)


def megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in _files(path)) / 1e6


def _files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
