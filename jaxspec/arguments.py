"""Checks of arguments: fields of configurations, integers, and sequences."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def check_field(config: Any, name: str, good: bool, expected: str) -> None:
    """Raises ValueError, with what is expected, unless a dataclass's field is good."""
    if not good:
        found = getattr(config, name)
        raise ValueError(f"{type(config).__name__}.{name} is {found!r}; expected {expected}")


def at_least(low: float, config: Any, *names: str) -> None:
    """Raises ValueError if a field of a dataclass is below `low`."""
    for name in names:
        check_field(config, name, getattr(config, name) >= low, f"at least {low}")


def check_seed(config: Any) -> None:
    """Raises ValueError unless a dataclass's `seed` has a random key and numbers of its own."""
    check_field(config, "seed", 0 <= config.seed < 2**32, f"0 … {2**32 - 1}")


def convert_field(config: Any, name: str, convert: Callable[[Any], Any], expected: str) -> None:
    """Stores convert(value) in a field of a frozen dataclass.

    Raises ValueError, with what is expected, where `convert` refuses the value.
    """
    converted = False
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        object.__setattr__(config, name, convert(getattr(config, name)))
        converted = True
    check_field(config, name, converted, expected)


def integer(name: str, value: Any, *, low: int | None = None) -> int:
    """An argument as an int; raises ValueError unless it is an integer, at least `low`."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected an integer") from None
    if low is not None and value < low:
        raise ValueError(f"{name} is {value}; expected at least {low}")
    return value


def sequence(name: str, values: Any) -> tuple:
    """An argument as a tuple; raises ValueError if it is a single value, as a text is."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}; expected a sequence: put it in []")
    return tuple(values)


def check_indices(config: Any, name: str, found: Sequence[int], count: int, of: str) -> None:
    """Raises ValueError, with what they index, unless all indices are 0 … count - 1."""
    bad = [i for i in found if not 0 <= i < count]
    if bad:
        kind = type(config).__name__
        raise ValueError(f"{kind}.{name} names {bad}; expected {of}, 0 … {count - 1}")
