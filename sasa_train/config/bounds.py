"""Declare and print config keys with their defaults, meanings and bounds."""

import itertools
import json
import math
import re
import shutil
import textwrap
from dataclasses import MISSING, Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The values that a key accepts besides null: numbers within limits (also in lists) or strings of a given form."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf
    is_range: bool = False  # [low,high]
    choices: tuple[str, ...] = ()
    is_path: bool = False
    name_length: int = 0  # maximum length of a plain folder name

    def hold(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.name_length:
            return len(value) <= self.name_length and bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]*", value))
        if self.is_path:
            return max(len(name.encode()) for name in value.split("/")) <= 255 and len(value.encode()) < 4096
        numbers = value if isinstance(value, list) else [value]
        if self.is_range and not (len(numbers) == 2 and 0 < numbers[0] <= numbers[1]):
            return False
        return all(self.above < number < self.below and self.at_least <= number <= self.at_most for number in numbers)

    def __str__(self) -> str:
        """Return the bounds in words that can follow "must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.name_length:
            return f"a plain folder name: letters, digits and _ . = , + -, {self.name_length} at most"
        if self.is_path:
            return "a path: 255 bytes per folder and 4,095 in all"
        if self.is_range:
            return "[low,high] with 0 < low <= high" + (f" <= {self.at_most}" if self.at_most < math.inf else "")
        if math.inf not in (-self.at_least, self.at_most):
            return f"from {self.at_least} to {self.at_most}"
        limits = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        words = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
        return " and ".join(words).replace("above 0", "positive")


def key(default: Any, meaning: str, may_change: bool = False, **bounds: Any) -> Any:
    """Declare a key as a dataclass field; `bounds` are passed to `Bounds`."""
    metadata = {"help": meaning, "may_change": may_change, "bounds": Bounds(**bounds) if bounds else None}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def local_key(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declare a key that may change when a run resumes, because it does not affect what the run computes."""
    return key(default, meaning, may_change=True, **bounds)


def written_default(key: Field) -> str:
    """Return a key's default in command-line notation."""
    default = key.default if key.default_factory is MISSING else key.default_factory()
    return default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))


def print_keys(keys: dict[str, Field], column: int) -> None:
    """Print each key with its default, meaning and bounds, and a blank line before each group."""
    for _, group in itertools.groupby(keys.items(), lambda item: item[0].rpartition(".")[0]):
        print()
        for name, key in group:
            bounds = f" [{key.metadata['bounds']}]" if key.metadata["bounds"] else ""
            print_entry(f"{name}={written_default(key)}", key.metadata["help"] + bounds, column)


def print_entry(name: str, text: str, column: int) -> None:
    """Print a name followed by its meaning, which starts at `column` and wraps at the terminal's width."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    print(textwrap.fill(text, width, initial_indent=f"  {name:<{column - 3}} ", subsequent_indent=" " * column))
