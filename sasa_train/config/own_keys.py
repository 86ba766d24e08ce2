"""The user's own presets and code, as far as command lines and configs name them; see `groups` and `own_code`."""

import shlex
from collections.abc import Sequence
from operator import attrgetter

from sasa_train.config import own_code
from sasa_train.config.groups import use_folders
from sasa_train.config.keys import TARGETS, TrainConfig
from sasa_train.config.overrides import values_of


def use_presets(overrides: Sequence[str]) -> None:
    """Make the presets in the folders of `configs=` available; raise ConfigError as `use_folders` does."""
    use_folders(list(values_of(overrides, ("configs",))))


def use_code(overrides: Sequence[str]) -> None:
    """Import the modules of plugins and `imports=`; allow those of the other keys that name code.

    Raises:
        ConfigError: see `own_code.use`.
    """
    own_code.use_plugins()
    own_code.use(list(values_of(overrides, ("imports",))))
    own_code.allow(map(own_code.module_of, values_of(overrides, TARGETS)))


def use_code_of(config: TrainConfig) -> None:
    """Do the same for a config whose values all come from a command line and presets, not from a saved config."""
    own_code.use_plugins()
    own_code.use(config.imports)
    own_code.allow(map(own_code.module_of, targets_of(config)))


def imports_for(config: TrainConfig, keys: Sequence[str] = TARGETS) -> str:
    """Return " imports=[...]" for a command that reads a run and needs the code in `keys`, or "" if it needs none."""
    modules = {own_code.module_name(entry): entry for entry in config.imports}
    for target in targets_of(config, keys):
        modules.setdefault(own_code.module_of(target), own_code.module_of(target))
    return " " + shlex.quote(f"imports=[{','.join(modules.values())}]") if modules else ""


def targets_of(config: TrainConfig, keys: Sequence[str] = TARGETS) -> list[str]:
    """Return the dotted names in `keys`."""
    values = [attrgetter(key)(config) for key in keys]
    return [name for value in values for name in (value if isinstance(value, list) else [value]) if name is not None]
