"""Exceptions for invalid configs and inputs, and the exceptions that libraries raise for invalid values."""

from typing import Any


class ConfigError(Exception):
    """Raised for an invalid config or input; the message names the key, value, rule and remedy. Exit code 2."""


class CheckpointError(Exception):
    """Raised if a checkpoint cannot be written or read; the message names the file and a remedy."""


class ExpectedFailure(Exception):
    """Raised for a foreseeable failure after the input was accepted; the message says what to do. Exit code 1."""


# timm, torch and others raise these for invalid values, in some cases only when the values are used.
LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={shorten(value)} {rule}")


def shorten(value: Any) -> str:
    """Convert a value to a string for use in a message, and truncate it if it is long."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"
