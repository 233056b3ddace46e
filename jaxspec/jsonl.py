"""JSON lines: reading a file without losing track of where a line stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        # Not `splitlines`: JSON strings may hold U+2028, at which it splits too.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())
