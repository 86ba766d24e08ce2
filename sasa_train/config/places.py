"""The places of a run's images and teacher as seen from where it was trained, which run.json and checkpoints name."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from sasa_train.config.keys import DataConfig, TrainConfig, with_values
from sasa_train.config.overrides import parse_overrides
from sasa_train.terminal import printable, say


def real(path: str) -> str:
    """Return a path without symbolic links; as it is, if it cannot be a path, or is a URL."""
    try:
        return path if "://" in path else os.path.realpath(path)
    except (OSError, ValueError):
        return path


def places(data: DataConfig) -> dict[str, str]:
    """Return the paths of a data set's images by their keys."""
    names = {"digits": (), "own": (), "list": ("train", "val", "root"), "hf": ("dataset",)}.get(data.name, ("root",))
    return {f"data.{name}": path for name in names if (path := getattr(data, name))}


def places_of(config: TrainConfig) -> dict[str, str]:
    """Return the paths of a run's images and of its teacher's file by their keys."""
    teacher = config.distill.file
    return places(config.data) | ({} if teacher is None else {"distill.teacher": teacher})


def where_trained(config: TrainConfig, directory: Any, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return a run's config with the relative places of its images and teacher, if there, taken from `directory`.

    Places that `overrides` give stay as they are, and so do those that are the same from the working directory.

    directory: that in which the run was trained, as its folder or checkpoint says; anything but a path changes nothing.
    """
    given = {override.key_or_group for override in parse_overrides(overrides)}
    if not isinstance(directory, str) or not os.path.isabs(directory) or "data.name" in given:
        return config
    found = {}
    for key, path in places_of(config).items():
        there = _joined(directory, path)
        if key not in given and os.path.exists(there) and real(there) != real(path):
            found[key] = there
    return with_values(config, found)


def _joined(directory: str, path: str) -> str:
    joined = os.path.join(directory, path)
    plain = os.path.normpath(joined)
    return plain if real(plain) == real(joined) else joined  # not so for .. after a symbolic link


def as_given(written: TrainConfig, seen: TrainConfig) -> dict[str, str]:
    """Return the places that `where_trained` changed, as written before, by their keys."""
    now = places_of(seen)
    return {key: path for key, path in places_of(written).items() if now[key] != path}


def tell_places(given: dict[str, str], seen: TrainConfig) -> None:
    """Say on stderr what the places of images in `given` (see `as_given`) are."""
    now = places(seen.data)  # only training reads the teacher, and it says which
    for key, path in given.items():
        if key not in now:
            continue
        say(f"{key}={printable(path)} is {printable(now[key])}, where the run was trained", sys.stderr)


def kept_places(config: TrainConfig, saved: TrainConfig, directory: Any) -> dict[str, str]:
    """Return the relative places of `saved`, by their keys, which `config` has in full, as seen from `directory`.

    Empty if a place of `config` is relative to the working directory: both are written relative to one directory.
    """
    now, before = places_of(config), places_of(where_trained(saved, directory))
    if config.data.name != saved.data.name or not all(map(os.path.isabs, now.values())):
        return {}
    old = places_of(saved)
    return {key: old[key] for key, path in now.items() if key in old and before[key] == path != old[key]}
