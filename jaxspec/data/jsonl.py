"""JSON lines: reading a file without losing track of where a line stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1.

    Raises:
      ValueError: the file cannot be read.
    """
    # Not `splitlines`: JSON strings may hold U+2028, at which it splits too.
    lines = read_text(path).split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def read_text(path: str | Path) -> str:
    """A file's text; ValueError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
