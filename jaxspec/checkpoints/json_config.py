"""Reads values of a `config.json`. Errors name the file, the key, the value and what was
expected; `JsonConfig.finish` checks the keys that were not read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

REQUIRED = object()
MOST = 10_000  # layers or experts
SHOWN = 200  # characters of a value in a message


class JsonConfig:
    """An object of a JSON file. A key that is absent or null has the default of the call.

    Keys that were looked up count as read; `finish` checks the others.

    Attributes:
      values: the object itself.
      origin: the file or folder, for messages.
      owner: "a target" or "a drafter", for messages.
    """

    def __init__(self, values: dict[str, Any], origin: Any, owner: str):
        self.values, self.origin, self.owner = values, origin, owner
        self._read: set[str] = set()
        self._sections: dict[str, JsonConfig] = {}

    def has(self, key: str) -> bool:
        self._read.add(key)
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        self._read.add(key)
        value = self.values.get(key)
        if value is None and default is REQUIRED:
            raise ValueError(
                f"{self.origin} has no '{key}'; it is not {self.owner}'s configuration"
            )
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 1) -> int:
        value = self.get(key, default)
        if value is None:  # the default
            return None
        if type(value) is not int or value < least:
            bound = "a positive integer" if least == 1 else f"an integer, at least {least}"
            raise self.refusal(key, bound)
        return value

    def count(self, key: str, default: Any = REQUIRED) -> int:
        """A number of layers or experts, which a damaged file cannot make too large to list."""
        value = self.integer(key, default)
        if value > MOST:
            raise self.refusal(key, f"at most {MOST}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e38:  # float32, not NaN
            raise self.refusal(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple, default: Any) -> Any:
        value = self.get(key, default)
        if not any(_equal(value, one) for one in allowed):
            raise self.refusal(key, " or ".join(map(repr, allowed)))
        return value

    def items(self, key: str, kind: type, default: Any = REQUIRED) -> tuple:
        """A list whose items are all of one kind, `int` or `str`."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or any(type(x) is not kind for x in value):
            raise self.refusal(key, f"a list of {'integers' if kind is int else 'texts'}")
        return tuple(value)

    def within(self, own: JsonConfig, key: str) -> JsonConfig:
        """The object that has a key: the section `own` if it has it, else this one."""
        inside, top = own.has(key), self.has(key)
        return own if inside or not top else self

    def section(self, key: str, default: Any = REQUIRED) -> JsonConfig:
        """An object inside the object."""
        value = self.get(key, default)
        if not isinstance(value, dict):
            raise self.refusal(key, "an object")
        if key not in self._sections:
            origin = f"{self.origin}, '{key}'"
            self._sections[key] = JsonConfig(value, origin, self.owner)
        return self._sections[key]

    def finish(self, harmless: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Checks the keys that were not read, also in sections that were read.

        Null values are ignored. Keys in neither table are named in one warning.

        Args:
          harmless: keys that may have any value, as may those that begin with "_".
          neutral: by key, the values without effect.

        Raises:
          ValueError: a key of `neutral` has another value.
        """
        unknown = self._unknown(harmless, neutral)
        if unknown:
            warnings.warn(
                f"{self.origin}: {', '.join(unknown)}: unknown and ignored; if it changes what "
                "the model computes, the output is wrong",
                stacklevel=2,
            )

    def _unknown(self, harmless, neutral) -> list[str]:
        found = []
        for key, value in self.values.items():
            if key in self._read or value is None or key in harmless or key.startswith("_"):
                continue
            if key not in neutral:
                found.append(repr(key))
            elif not any(_equal(value, one) for one in neutral[key]):
                raise self.refusal(key, " or ".join(map(repr, neutral[key])) or "no such key")
        for name, section in self._sections.items():
            found += [f"{key} in '{name}'" for key in section._unknown(harmless, neutral)]
        return found

    def refusal(self, key: str, expected: str) -> ValueError:
        value = repr(self.values.get(key))
        if len(value) > SHOWN:
            value = f"{value[:SHOWN]}…"
        return ValueError(
            f"{self.origin}: '{key}' is {value}, which is not supported; expected {expected}"
        )

    def make(self, config: type, **fields: Any) -> Any:
        """`config(**fields)`, with the file's name in front of its errors."""
        try:
            return config(**fields)
        except ValueError as error:
            raise ValueError(f"{self.origin}: {error}") from None


def _equal(value: Any, other: Any) -> bool:
    """Equality as JSON: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
