"""Rows of one file: JSON lines, a JSON array or parquet, recognised by content."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxspec.data.compression import opened, without_suffix
from jaxspec.data.jsonl import BOM, byte_lines, parse_array, parse_object
from jaxspec.data.tables import PARQUET_MAGIC, parquet_rows

LINES, ARRAY, PARQUET = "JSON lines", "a JSON array", "parquet"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
EXPECTED = (
    "expected JSON lines, a JSON array, parquet, a folder of these, a folder that `datasets` "
    "saved, or OWNER/NAME of a dataset on the Hugging Face hub"
)
TRIED = 20  # first rows of a JSON file, at least one of which must be readable


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of data and its location.

    Attributes:
      where: file and line (from 1), or row (from 0).
      number: index in the source, from 0.
      content: its fields, or the error of an unreadable row.
    """

    where: str
    number: int
    content: dict[str, Any] | ValueError

    @property
    def fields(self) -> dict[str, Any]:
        """The fields; raises ValueError, without `where`, if they could not be read."""
        if isinstance(self.content, ValueError):
            raise self.content
        return self.content


def file_format(path: Path) -> tuple[str, str | None]:
    """The format and compression (None without one) of a file, by its first bytes.

    Raises:
      ValueError: the file cannot be read, or has another format.
    """
    with opened(path) as (stream, compression):
        head = stream.peek(512)
    if head.startswith(PARQUET_MAGIC):
        return PARQUET, compression
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 text; save it as UTF-8")
    if b"\0" in head or head.startswith(b"\x80"):
        raise ValueError(f"cannot tell what {path} holds (it begins {head[:16]!r}); {EXPECTED}")
    array = head.removeprefix(BOM).lstrip().startswith(b"[")
    return ARRAY if array else LINES, compression


def is_data_file(path: Path) -> bool:
    """Whether a file's name has the suffix of a data file."""
    return without_suffix(path.name).endswith(SUFFIXES)


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a file; a row that is not a JSON object holds an error.

    Raises:
      ValueError: the file is damaged, or none of its first rows is a JSON object.
    """
    kind, _ = file_format(path)
    if kind == PARQUET:
        yield from numbered_rows(parquet_rows(path), path)
        return
    rows = _array_rows(path) if kind == ARRAY else _line_rows(path)
    first = list(itertools.islice(rows, TRIED))
    if first and all(isinstance(row.content, ValueError) for row in first):
        raise ValueError(f"{first[0].where}: {first[0].content}; {EXPECTED}")
    yield from first
    yield from rows


def numbered_rows(rows: Iterable[Any], where: str | Path) -> Iterator[Row]:
    """Rows of a table, counted from 0; each is its fields, or its error."""
    for number, content in enumerate(rows):
        if not isinstance(content, dict | ValueError):
            content = ValueError(f"expected a JSON object, found {repr(content)[:60]}")
        yield Row(f"{where}, row {number}", number, content)


def _array_rows(path: Path) -> Iterator[Row]:
    with opened(path) as (stream, _):
        content = stream.read()
    try:
        rows = parse_array(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {EXPECTED}") from error
    yield from _line_rows(path) if rows is None else numbered_rows(rows, path)


def _line_rows(path: Path) -> Iterator[Row]:
    with opened(path) as (stream, _):
        for number, line in byte_lines(stream):
            try:
                content = parse_object(line)
            except ValueError as error:
                content = error
            yield Row(f"{path}, line {number}", number - 1, content)
