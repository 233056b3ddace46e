"""`--config run.toml`: the flags of a command in a file."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPTION = "--config"
ONCE = ("config", "resume_step")  # flags of one call, not repeated with the run


def expanded(command: type, words: Sequence[str]) -> list[str]:
    """The command line, preceded by the flags of its `--config` file.

    Flags on the command line replace those of the file.

    Raises:
      ValueError: the file cannot be read, or a key is not a flag of the command.
    """
    words = list(words)
    names = {field.name for field in dataclasses.fields(command)}
    place = next((i for i, x in enumerate(words) if x.partition("=")[0] == OPTION), None)
    if "config" not in names or place is None:
        return words
    _, equals, path = words[place].partition("=")
    if not equals:
        path = next(iter(words[place + 1 : place + 2]), "")
    if not path:
        return words  # the parser reports what is missing
    kinds = typing.get_type_hints(command)
    settings = _read(Path(path), names - {"config"})
    given = {_name(word) for word in words if word.startswith("--")}
    flags: list[str] = []
    for name, value in settings.items():
        if name not in given and f"no_{name}" not in given:
            flags += _words(name, value, kinds[name] is bool)
    return flags + words


def settings_of(command: Any) -> dict[str, Any]:
    """The flags of a command as TOML values, without those that are None."""
    settings = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if value is not None and field.name not in ONCE:
            settings[field.name] = _plain(value)
    return settings


def _read(path: Path, names: set[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            settings = tomllib.load(stream)
    except OSError as error:
        raise ValueError(f"cannot read {OPTION} {path}: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{OPTION} {path} is not TOML ({error})") from error
    for name, value in settings.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise ValueError(
                f"{OPTION} {path}: unknown key '{name}'; did you mean '{near[0]}'?"
            )
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(x, str | int | float) for x in values):
            raise ValueError(
                f"{OPTION} {path}: '{name}' is {value!r}; expected text, a number, true or "
                "false, or a list of them"
            )
    return settings


def _words(name: str, value: Any, switch: bool) -> list[str]:
    """One flag as words of a command line."""
    flag = name.replace("_", "-")
    if switch and isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={value}"]


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value
