"""Tests of many cases: which of them `make test` runs, where all take long."""

from collections.abc import Iterable

import pytest


def slow_but(quick: Iterable, values: Iterable, *, mark=pytest.mark.slow) -> list:
    """Values to parametrize a test with: those in `quick` as they are, the others marked."""
    quick, values = list(quick), list(values)
    missing = [value for value in quick if value not in values]
    if missing:
        raise ValueError(f"{missing} are to be quick, but are not among {values}")
    marked = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        value if value in quick else pytest.param(*row, marks=mark)
        for value, row in zip(values, marked, strict=True)
    ]
