"""The run that a command begins or continues: found by its name, or by its images, however they are written."""

import contextlib
import re
import stat
from pathlib import Path

from sasa_train.config.identity import run_name_in
from sasa_train.config.keys import TrainConfig, with_values
from sasa_train.config.places import places, real, where_trained
from sasa_train.config.saved import load_config_file
from sasa_train.files import is_there, read_regular
from sasa_train.refusal import ConfigError
from sasa_train.runs.info import read_info


def find_begun(config: TrainConfig, folder: Path) -> tuple[str, TrainConfig]:
    """Return the name of a config's run in `folder`, and the config with the places of its images as the run has them.

    A run is found even if its images are written in another way, as in ./photos or /home/me/photos for photos.
    """
    name = config.run_name or run_name_in(str(folder), config)
    if config.run_name or config.resume != "auto" or not places(config.data) or is_there(folder / name):
        return name, config
    alike = re.compile(re.escape(name[:-8]) + "[0-9a-f]{8}")  # all but the hash
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if alike.fullmatch(path.name) and is_there(path / "config.yaml", stat.S_ISREG):
            with contextlib.suppress(ConfigError, OSError, ValueError):
                if (begun := _begun_as(path, config)) is not None:
                    return path.name, begun
    return name, config


def _begun_as(path: Path, config: TrainConfig) -> TrainConfig | None:
    """Return the config with the places as the run in `path` has them, if this is its run; otherwise None."""
    given, text = places(config.data), read_regular(path / "config.yaml").decode()
    if all(f": {place}\n" in text for place in given.values()):  # written alike, so other keys differ; parsing is slow
        return None
    saved = load_config_file(path / "config.yaml")
    seen = places(where_trained(saved, read_info(path).get("directory")).data)
    if {key: real(place) for key, place in seen.items()} != {key: real(place) for key, place in given.items()}:
        return None
    as_saved = with_values(config, places(saved.data))
    return with_values(config, seen) if run_name_in(str(path.parent), as_saved) == path.name else None
