"""Helpers that mark cases for `pytest.mark.parametrize`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but_for(fast: Collection, cases: Iterable) -> list[Any]:
    """Return all cases, with those that are not in `fast` marked as slow."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
