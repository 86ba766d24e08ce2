"""Marks for parametrize."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but_for(fast: Collection, cases: Iterable) -> list[Any]:
    """All of the cases; those that are not in `fast` are marked slow."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
