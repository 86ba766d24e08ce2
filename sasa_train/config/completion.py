"""Shell completion of overrides (groups, choices, keys and values), without importing Hydra or torch."""

import typing
from collections.abc import Sequence

from sasa_train.config.groups import choices
from sasa_train.config.keys import CHOICES, OWN_MODELS, key_table

WORDS = {**CHOICES, "model.name": OWN_MODELS, "resume": ("auto", "never"), "weights": ("ema", "raw")}


def complete_override(
    current: str, groups: Sequence[str], meanings: dict[str, str], is_sweep: bool = False
) -> dict[str, str]:
    """Return a dict from each completion of `current` to its meaning.

    Groups such as `model=` and `trainer.` come first, then keys such as `trainer.epochs=`, then values. In a sweep,
    values are offered after each comma. Completions that end in `=` or `.` can be completed further.
    """
    key, equals, value = current.partition("=")
    if equals:
        given = value.rpartition(",")[0] + "," if is_sweep and "," in value else ""
        words = choices(key) if key in groups else _values(key)
        return dict.fromkeys([f"{key}={given}{word}" for word in words], "")
    found = {f"{group}=": "a file in configs/" for group in groups}
    for name, meaning in meanings.items():
        prefix = name[: name.rfind(".") + 1]
        found |= {f"{name}=": meaning} if current.startswith(prefix) else {prefix: "keys"}
    return found


def _values(key: str) -> Sequence[str]:
    field = key_table().get(key)
    if field is not None and bool in (field.type, *typing.get_args(field.type)):
        return ("true", "false")
    return WORDS.get(key, ())
