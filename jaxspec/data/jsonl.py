"""JSON files, possibly compressed: one object per line, or one array of objects."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxspec.data.compression import opened

BOM = codecs.BOM_UTF8


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines, with their numbers from 1.

    Raises:
      ValueError: the file cannot be read, or a line is not UTF-8.
    """
    with opened(path) as (stream, _):
        for number, line in byte_lines(stream):
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"cannot read {path}: {error}") from error


def byte_lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """`numbered_lines` of a stream, before decoding.

    Only "\\n" ends a line: JSON strings may hold U+2028, at which `str.splitlines` splits too.
    """
    for number, line in enumerate(stream, 1):
        line = (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")
        if line.strip():
            yield number, line


def parse_object(line: str | bytes) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
      ValueError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}): {line[:60]!r}") from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {text[:60]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {text[:60]!r}")
    return row


def parse_array(content: bytes) -> list[Any] | None:
    """The elements of one JSON array; None if there is more than one value, as in JSON lines.

    Raises:
      ValueError: it is not JSON.
    """
    try:
        rows = json.loads(content.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return None
        raise ValueError(f"not a JSON array ({error})") from error
    return rows if isinstance(rows, list) else None


def read_text(path: str | Path) -> str:
    """A file's text, without a byte order mark; ValueError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
