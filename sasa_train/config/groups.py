"""The config groups and their files, for composition, help and completion; Hydra is not imported, to keep help fast.

Files come from `configs/` and from the user's own folders, which are named by `configs=` and $SASA_CONFIGS.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from sasa_train.refusal import ConfigError

GROUPS = ("model", "data", "optimizer", "schedule", "augment", "experiment")
VARIABLE = "SASA_CONFIGS"  # folders, separated as in $PATH

_own: list[Path] = []  # the user's folders, in the order in which they were given
_files: dict[str, Path] = {}  # choices that are files, by the name under which they are composed


def config_dir() -> Path:
    """Return the path of `configs/`, which is inside the package after installation and beside it in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def own_dirs() -> list[Path]:
    """Return the user's folders: those in $SASA_CONFIGS, then those given to `use_folders`."""
    of_variable = [Path(folder).resolve() for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    return list(dict.fromkeys([*of_variable, *_own]))


def use_folders(folders: Sequence[str]) -> None:
    """Take the user's own folders of groups and presets, instead of those given before.

    Raises:
        ConfigError: a folder does not exist, has no groups, or has a preset with the name of another one.
    """
    _own[:] = []
    named = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    dirs = tuple(dict.fromkeys([*own_dirs(), *named]))
    taken = {group: dict.fromkeys(_stems(config_dir(), group), config_dir()) for group in (*GROUPS, "sweep")}
    for folder in dirs:
        key = f"configs={folder}" if folder in named else f"${VARIABLE}={folder}"
        if not folder.is_dir():
            raise ConfigError(f"{key}: there is no such folder; relative paths begin in {os.getcwd()}")
        if not any((folder / group).is_dir() for group in taken):
            raise ConfigError(f"{key}: has none of the folders {', '.join(f'{group}/' for group in taken)}")
        for group, names in taken.items():
            for name in _stems(folder, group):
                if name in names:
                    raise ConfigError(
                        f"{key}: {group}/{name}.yaml has the name of a preset in {names[name]}; rename yours"
                    )
                names[name] = folder
    _own[:] = named


def choices(group: str) -> list[str]:
    return sorted({name for folder in (config_dir(), *own_dirs()) for name in _stems(folder, group)})


def choice_file(group: str, name: str) -> Path | None:
    """Return the file of a choice, or None if no folder has it."""
    paths = (folder / group / f"{name}.yaml" for folder in (config_dir(), *own_dirs()))
    return next((path for path in paths if path.is_file()), None)


def is_file(choice: str) -> bool:
    """Whether a choice is the path of a file, as in experiment=./mine.yaml."""
    return choice.endswith((".yaml", ".yml"))


def name_of_file(choice: str) -> str:
    """Return the name under which a choice that is a file is composed; see `file_named`."""
    path = Path(choice).expanduser().resolve()
    name = f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    _files[name] = path
    return name


def file_named(name: str) -> Path | None:
    return _files.get(name)


def _stems(folder: Path, group: str) -> list[str]:
    return [path.stem for path in (folder / group).glob("*.yaml") if not path.name.startswith(".")]
