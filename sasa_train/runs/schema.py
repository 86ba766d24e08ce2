"""Check values read from a file, which may have been edited by hand or come from an untrusted source.

A schema is a type, None, a `Rule`, a tuple of alternatives, a list with the schema of all elements, or a dict from keys
to schemas. In a dict, `Maybe` marks an entry that may be missing, and `str` stands for all entries that are not listed.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from sasa_train.refusal import shorten
from sasa_train.terminal import printable

MAX_DEPTH = 10  # levels of lists and dicts in values of any shape
# A short file can contain the same text or list again and again, so what is read from it may take far more time and
# memory than the file's size suggests.
MAX_PARTS = 10**6  # values in a list, or in one level of values of any shape
MAX_TEXT = 2**20  # characters in a text
MAX_TEXTS = 2**26  # characters in all texts of one level
FLOAT32 = 3.5e38  # the largest float32 is 3.4e38; sums and squares of such numbers are finite in float64
MAX_SECONDS = 1e12
TEXTS: dict[Any, str] = {
    None: "null",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a dict with texts as keys",
}


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


# Of a run in its trackers.
TRACKER_ID = Rule(
    "16 hexadecimal digits", lambda text: isinstance(text, str) and bool(re.fullmatch("[0-9a-f]{16}", text))
)


@dataclass(frozen=True)
class Maybe:
    schema: Any


def first_wrong(value: Any, schema: Any) -> str | None:
    """Name the first part that the schema does not allow, as in "best.top1='x' must be a finite number", or None."""
    wrong = _first_wrong(value, schema, "")
    return None if wrong is None else f"{wrong[0] or 'its content'}{wrong[1]} must be {wrong[2]}"


def _first_wrong(value: Any, schema: Any, path: str) -> tuple[str, str, str] | None:
    """Return the path of the first wrong part, what is there instead, and what it must be, or None."""
    if isinstance(schema, Maybe):
        return _first_wrong(value, schema.schema, path)
    if isinstance(schema, tuple):
        found = [_first_wrong(value, alternative, path) for alternative in schema]
        wrong = [each for each in found if each is not None]
        if len(wrong) < len(found):
            return None
        inside = [each for each in wrong if each[0] != path]  # the value has the type of this alternative
        return inside[0] if inside else (*wrong[0][:2], " or ".join(rule for _, _, rule in wrong))
    if isinstance(schema, list) and isinstance(value, list):
        if len(value) > MAX_PARTS:
            return path, f" has {len(value):,} parts, and", f"a list of at most {MAX_PARTS:,}"
        first_of = {id(each): i for i, each in reversed(list(enumerate(value)))}  # the same part is checked once
        return _first((value[i], schema[0], f"{path}[{i}]") for i in sorted(first_of.values()))
    if isinstance(schema, dict) and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        prefix = f"{path}." if path else ""
        for key, inner in schema.items():
            if key is not str and key not in value and not isinstance(inner, Maybe):
                return f"{prefix}{key}", " is missing, and", _text(inner)
        checked = {key: schema.get(key, schema.get(str)) for key in value if key in schema or str in schema}
        return _first((value[key], inner, f"{prefix}{printable(shorten(key))}") for key, inner in checked.items())
    return None if _holds(value, schema) else (path, _shown(value), _text(schema))


def _first(parts: Iterable[tuple[Any, Any, str]]) -> tuple[str, str, str] | None:
    return next((wrong for part in parts if (wrong := _first_wrong(*part)) is not None), None)


def _holds(value: Any, schema: Any) -> bool:
    if isinstance(schema, Rule):
        return schema.holds(value)
    return value is None if schema is None else isinstance(schema, type) and isinstance(value, schema)


def _text(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_text, schema))
    if isinstance(schema, Rule):
        return schema.text
    return TEXTS[type(schema) if isinstance(schema, list | dict) else schema]


def _shown(value: Any) -> str:
    is_short = value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) <= 2**64)
    return f"={printable(shorten(repr(value)))}" if is_short else f" ({type(value).__name__})"


def whole(low: int, high: int = 2**53) -> Rule:
    words = f"a whole number from {low}" + (f" to {high}" if high != 2**53 else "")
    return Rule(words, lambda value: type(value) is int and low <= value <= high)


def number(low: float = -FLOAT32, high: float = FLOAT32) -> Rule:
    def holds(value: Any) -> bool:
        # Larger integers than 2**63 fit into no array.
        is_number = type(value) is float or (type(value) is int and abs(value) <= 2**63)
        return is_number and low <= value <= high

    return Rule(f"a finite number from {low:g} to {high:g}", holds)


def is_plain(value: Any) -> bool:
    """Return whether a value is null, a text, or a number that fits into 64 bits."""
    if isinstance(value, int):
        return abs(value) <= 2**63
    return value is None or isinstance(value, float) or _is_text(value)


def _is_text(value: Any, max_length: int = MAX_TEXT) -> bool:
    """Return whether a value is a text that can be encoded; names of files may contain surrogate escapes."""
    try:
        return (
            isinstance(value, str) and len(value) <= max_length and value.encode(errors="surrogateescape") is not None
        )
    except UnicodeEncodeError:
        return False


def consists_of(value: Any, is_leaf: Callable[[Any], bool]) -> bool:
    """Return whether all values in lists and dicts are leaves, without recursion: a list may contain itself."""
    level = [value]
    for _ in range(MAX_DEPTH):
        dicts = [each for each in level if isinstance(each, dict)]
        lists = [each for each in level if isinstance(each, list | tuple)]
        keys = list(islice(chain(*dicts), MAX_PARTS + 1))
        if len(keys) > MAX_PARTS or sum(len(each) for each in (*level, *keys) if isinstance(each, str)) > MAX_TEXTS:
            return False
        if not all(isinstance(each, dict | list | tuple) or is_leaf(each) for each in level):
            return False
        if not all(is_plain(key) and isinstance(key, str | int) for key in keys):
            return False
        level = list(islice(chain(*(each.values() for each in dicts), *lists), MAX_PARTS + 1))
        if not level or len(level) > MAX_PARTS:
            return not level
    return False


def text(max_length: int) -> Rule:
    return Rule(f"a text of at most {max_length:,} characters that can be encoded", lambda t: _is_text(t, max_length))


TEXT = text(MAX_TEXT)
PLAIN = Rule("texts, numbers, lists and dicts of them", lambda value: consists_of(value, is_plain))
