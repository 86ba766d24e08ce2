"""The errors that refuse a config or an input, and those that libraries raise in their place."""

from typing import Any


class ConfigError(Exception):
    """A refused config or input: the message names the key, its value, the rule and the remedy. Exit code 2."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


class ExpectedFailure(Exception):
    """An expected failure of something accepted: the message says what to do. Exit code 1."""


# timm, torch and others raise these for impossible values, perhaps only where the values are used.
LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={shorten(value)} {rule}")


def shorten(value: Any) -> str:
    """Return a value as messages show it; of a long one its beginning is enough."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"
