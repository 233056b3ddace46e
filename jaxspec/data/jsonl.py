"""JSON lines: reading a file without losing track of where a line stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1.

    Raises:
      ValueError: the file cannot be read.
    """
    # Not `splitlines`: JSON strings may hold U+2028, at which it splits too.
    lines = read_text(path).split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def parse_object(line: str) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
      ValueError: it is no JSON, or something else than an object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {line[:60]!r}")
    return row


def read_text(path: str | Path) -> str:
    """A file's text, without a byte order mark; ValueError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
