"""Read and write `trainer.class_weights`: balanced, or weights by the names of classes, which may be any text.

Hydra's {name:value} allows neither quotes nor letters beyond ASCII in names, so braces are a text to Hydra here.
"""

import json
import re
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from sasa_train.config.keys import ARGUMENT_NAME, CLASS_WEIGHTS, WEIGHTS_RULE
from sasa_train.refusal import ConfigError, require, shorten

# No two neighbouring parts of these patterns match the same characters, or a long text would take very long.
NAME = r"""'[^']*'\s*|"(?:[^"\\]|\\.)*"\s*|[^\s'"{}:,][^{}:,]*"""
WEIGHT = r"""[^{}:,'"]+"""
ENTRY = re.compile(rf"\s*({NAME}):({WEIGHT})")
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""  # by Hydra
BRACES = re.compile(rf"({QUOTED})|(?<!\\)\{{(?:\s*|\s*(?:{NAME}):{WEIGHT}(?:,\s*(?:{NAME}):{WEIGHT})*)\}}")


def quote_braces(override: str) -> str:
    """Write each {name: weight} in an override of `trainer.class_weights`, which may be a sweep, as a quoted text."""
    key, equals, value = override.partition("=")
    if key.lstrip("+~") != CLASS_WEIGHTS:
        return override
    is_read = re.search(r"(?<!\\)\{", BRACES.sub("", value)) is None
    require(is_read, CLASS_WEIGHTS, value, f"{WEIGHTS_RULE}; quote names with signs, as in {{'a, b': 2}}")
    return key + equals + BRACES.sub(lambda m: m[0] if m[1] else QuotedString(m[0], Quote.single).with_quotes(), value)


def read_weights(value: Any) -> Any:
    """Return weights in braces, or from a file, as a dict of floats, or None if there are none; other values as is.

    Raises:
        ConfigError: a text in braces is malformed, or names a class twice.
    """
    entries = value
    if isinstance(value, str) and value.startswith("{"):
        require(bool(BRACES.fullmatch(value)), CLASS_WEIGHTS, value, WEIGHTS_RULE)
        found = [(_name(name.strip()), weight.strip()) for name, weight in ENTRY.findall(value)]
        entries = dict(found)
        twice = [name for name, _ in found if [other for other, _ in found].count(name) > 1]
        require(not twice, CLASS_WEIGHTS, value, f"must name each class once, but names {twice[:1]} again")
    if not isinstance(entries, dict):
        return value
    return {str(name): _number(weight) for name, weight in entries.items()} or None


def written_name(name: Any) -> str:
    """Write a name in braces, in quotes unless Hydra and YAML, too, read it as a text."""
    return str(name) if ARGUMENT_NAME.fullmatch(str(name)) else json.dumps(str(name), ensure_ascii=False)


def _name(text: str) -> str:
    if not text.startswith('"'):
        return text[1:-1] if text.startswith("'") else text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{CLASS_WEIGHTS}: {shorten(text)} cannot be read ({error}); use single quotes") from error


def _number(weight: Any) -> Any:
    """Return a number as a float, so that 2 and 2.0 are the same run; anything else as it is, for `check_values`."""
    try:
        return weight if isinstance(weight, bool) or weight is None else float(weight)
    except (TypeError, ValueError, OverflowError):
        return weight
