"""Values of a `config.json`: each refusal names the file, the key, what it is and what it
should be."""

from __future__ import annotations

from typing import Any

REQUIRED = object()


class JsonConfig:
    """An object of a JSON file. A key that is absent or null takes the default of its reading.

    Attributes:
      values: the object itself.
      origin: the file or folder, for messages.
      owner: whose configuration it is, for messages: "a target", "a drafter".
    """

    def __init__(self, values: dict[str, Any], origin: Any, owner: str):
        self.values, self.origin, self.owner = values, origin, owner

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        value = self.values.get(key)
        if value is None and default is REQUIRED:
            raise ValueError(
                f"{self.origin} has no '{key}'; it is not {self.owner}'s configuration"
            )
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < least:
            positive = {0: "an integer, at least 0", 1: "a positive integer"}
            raise self.refusal(key, positive[least])
        return value

    def number(self, key: str, default: float) -> float:
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
        if value not in allowed:
            raise self.refusal(key, " or ".join(map(repr, allowed)))
        return value

    def items(self, key: str, kind: type, default: Any = REQUIRED) -> tuple:
        """A list whose items are all of one kind, `int` or `str`."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or any(type(x) is not kind for x in value):
            raise self.refusal(key, f"a list of {'integers' if kind is int else 'texts'}")
        return tuple(value)

    def section(self, key: str, default: Any = REQUIRED) -> JsonConfig:
        """An object inside the object."""
        value = self.get(key, default)
        if not isinstance(value, dict):
            raise self.refusal(key, "an object")
        return JsonConfig(value, f"{self.origin}, '{key}',", self.owner)

    def rope_theta(self) -> float:
        """Base of the rotary frequencies, under transformers 5's key or transformers 4's."""
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.section(key, {})
            if rope.get("rope_type", rope.get("type", "default")) != "default":
                raise self.refusal(key, "'rope_type': 'default'")
            if rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.refusal(key, "'partial_rotary_factor': 1.0")
        theirs = self.section("rope_parameters", {})
        return (theirs if theirs.has("rope_theta") else self).number("rope_theta", 10_000.0)

    def refusal(self, key: str, expected: str) -> ValueError:
        return ValueError(
            f"{self.origin}: '{key}' is {self.values.get(key)!r}, which is not supported; "
            f"expected {expected}"
        )

    def make(self, config: type, **fields: Any) -> Any:
        """`config(**fields)`; its own refusals begin with the file."""
        try:
            return config(**fields)
        except ValueError as error:
            raise ValueError(f"{self.origin}: {error}") from None
