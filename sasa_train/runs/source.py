"""The run or checkpoint given to a command, and its checks that do not need PyTorch, whose import takes seconds."""

import difflib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from sasa_train.files import is_there
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import CheckpointError, ConfigError
from sasa_train.terminal import printable, some

EXPORTED = (".safetensors", ".onnx", ".pt2")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
FIRST = "the run, or a checkpoint file, comes first, as in sasa-predict outputs/RUN photos"


def find_checkpoint(source: Path) -> Path:
    """Return `source` itself if it is not a folder; otherwise, return the run's best.pt or, if it has none, last.pt."""
    if not os.path.isdir(source):  # also for a name that is invalid on any file system
        return source
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    return folder / "best.pt" if is_there(folder / "best.pt") else folder / "last.pt"


def check_source(source: Path, overrides: Sequence[str]) -> None:
    """Check the arguments of a command that reads a checkpoint, as far as this is possible without reading it.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: an override is invalid for any checkpoint, `source` is a folder of runs, or this is one of several
            processes, which would all do the same work.
    """
    # Imported here, because importing Hydra takes a tenth of a second, which importing this module should not.
    from sasa_train.config.overrides import split_weights
    from sasa_train.config.saved import check_overrides

    if world_size() > 1:
        raise ConfigError(f"WORLD_SIZE={world_size()}: this is one process's work; run it without torchrun")
    path = find_checkpoint(source)
    others = [word for word in overrides if "=" not in word and os.path.lexists(word)]
    check_overrides(split_weights([word for word in overrides if word not in others])[1], source=str(path))
    if wrong := _other_than_a_run(source, path):
        raise ConfigError(f"{printable(source)}: {wrong}{_about_others('RUN', others)}")
    if not is_there(path) and (runs := _runs_in(source)):
        raise ConfigError(
            f"{source}: is not a run folder, but holds the runs {some(runs)}; give one of them (sasa-report --list "
            f"{source} shows how good they are){_about_others('RUN', others)}"
        )
    if others:
        raise ConfigError(f"{printable(others[0])}: is not a key=value{_about_others(str(source), others)}")
    if is_there(path):
        return
    if not os.path.lexists(path):
        hint = "; this run has saved no checkpoint yet" if (source / "config.yaml").exists() else similar_runs(source)
        raise CheckpointError(f"{path}: cannot be read (No such file or directory){hint}")


def _about_others(run: str, others: Sequence[str]) -> str:
    """Say how pictures are given, of which `others` are files or folders, in a command that reads the run's own."""
    if not others:
        return ""
    return (
        f"; pictures without labels: {shlex.join(['sasa-predict', run, *others])}; other labelled ones, in one folder "
        f"per class, instead of the run's: {shlex.quote(f'data.root={others[0]}')}"
    )


def _other_than_a_run(source: Path, path: Path) -> str:
    """Say what `source` is if it is clearly neither a run nor a checkpoint; `path` is where its checkpoint would be."""
    suffix = source.suffix.lower()
    if os.path.isdir(source):
        holds = {name for name in ("checkpoints", "config.yaml", "best.pt", "last.pt") if (source / name).exists()}
        is_other = not (holds or source.name == "checkpoints" or _runs_in(source))
        suffixes = {item.suffix for item in source.iterdir()} if is_other and os.access(source, os.R_OK) else set()
        if not suffixes.isdisjoint(EXPORTED):
            return _about_export(source)
        return f"is not a run folder; {FIRST}" if is_other else ""
    if not os.path.isfile(path):
        return ""
    if suffix in EXPORTED:
        return _about_export(source)
    return f"is an image, not a run; {FIRST}" if suffix in IMAGES else ""


def _about_export(source: Path) -> str:
    runs = [folder for folder in source.absolute().parents if (folder / "checkpoints").is_dir()]
    run = f" ({os.path.relpath(runs[0])})" if runs else ""
    return f"is an export; give the run that it was made from{run}, or a .pt file; see docs/export.md for exports"


def similar_runs(source: Path, with_sweeps: bool = False) -> str:
    """Return '; did you mean ...?' with the runs whose names begin with or resemble that of `source`, else ''."""
    for folder in dict.fromkeys((source.parent, Path("outputs"))):
        names = _runs_in(folder) + (_sweeps_in(folder) if with_sweeps else [])
        begun = [name for name in names if name.startswith(source.name)]
        if found := begun or difflib.get_close_matches(source.name, names, n=1, cutoff=0.8):
            return f"; did you mean {some([str(folder / name) for name in found])}?"
    return ""


def _runs_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.yaml")) if os.path.isdir(folder) else []


def _sweeps_in(folder: Path) -> list[str]:
    return sorted({path.parent.name for path in folder.glob("*/ledger*.json")}) if os.path.isdir(folder) else []
