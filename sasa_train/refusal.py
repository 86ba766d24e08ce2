"""What refuses a config or an input: ConfigError, and what libraries raise in its place."""

from typing import Any


class ConfigError(Exception):
    """A refused config or input: the message names the key, its value, the rule and the remedy. Exit code 2."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


class ExpectedFailure(Exception):
    """An end that was foreseen, not refused: the message says what to do. Exit code 1."""


# What timm, torch and their like raise over values that cannot be, or only then where they are used.
LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={shorten(value)} {rule}")


def shorten(value: Any) -> str:
    """A value as messages show it: its beginning is enough."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"
