"""Rows of users' data in any supported format; the reader of all commands.

A source is a file, a folder of files, a folder that `datasets` saved, or the name of a dataset
on the Hugging Face hub. A suffix `::SPLIT` chooses a split, `::SUBSET/SPLIT` a subset's split
on the hub, and `[:1000]` the first rows: `HuggingFaceH4/ultrachat_200k::train_sft[:1000]`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxspec.data import tables
from jaxspec.data.compression import without_suffix
from jaxspec.data.files import LINES, Row, file_format, file_rows, is_data_file, numbered_rows
from jaxspec.data.folders import SAVED, choose_split, data_files, refuse_programs
from jaxspec.data.messages import PLAIN_SHAPES, shape_of

HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CHOICE = re.compile(
    r"(?P<name>.+?)(?:::(?:(?P<subset>[\w.-]+)/)?(?P<split>[\w.-]+))?(?:\[:(?P<limit>\d+)\])?"
)


@dataclasses.dataclass
class Source:
    """Rows of one source; every iteration reads them again.

    The format is printed to standard error with the first row, unless it is a `.jsonl` file in
    jaxspec's own format.

    Attributes:
      name: the name as given.
      label: short name, without folders and suffixes.
      format: description of the format.
      shapes: number of rows read so far, by format (`messages.shape_of`).
    """

    name: str
    label: str
    format: str
    _rows: Callable[[], Iterator[Row]]
    shapes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __iter__(self) -> Iterator[Row]:
        self.shapes.clear()
        for row in self._rows():
            shape = None if isinstance(row.content, ValueError) else shape_of(row.content)
            if shape is not None:
                if not self.shapes:
                    self._announce(shape)
                self.shapes[shape] += 1
            yield row

    def _announce(self, shape: str) -> None:
        plain = self.format == LINES and self.name.endswith(".jsonl")
        if not plain or shape not in PLAIN_SHAPES:
            print(f"{self.name}: read as {self.format}, {shape}", file=sys.stderr)

    def summary(self) -> dict[str, Any]:
        """Name, format and rows by format, for reports of commands."""
        return {"source": self.name, "format": self.format, "rows": dict(self.shapes)}


def open_source(name: str | Path | Source) -> Source:
    """Opens a source by name and recognises its format, without reading rows.

    Raises:
      ValueError: it cannot be read, its format is unknown, a split must be chosen, or a library
        that it needs is not installed.
    """
    if isinstance(name, Source):
        return name
    name = str(name)
    where, subset, split, limit = _parsed(name)
    path = Path(where)
    if path.is_dir():
        label, (found, read) = path.resolve().name, _folder(path, split)
    elif HUB.fullmatch(where) and not path.exists() and not is_data_file(path):
        label, (found, read) = path.name, _hub(where, subset, split)
    else:
        kind, compression = file_format(path)
        if split is not None:
            raise ValueError(f"{where} is one file and has no split {split!r}")
        label = Path(without_suffix(path.name)).stem
        found = kind if compression is None else f"{kind} ({compression})"
        read = functools.partial(file_rows, path)
    label = "-".join(x for x in (label, subset, split) if x)
    if limit is None:
        return Source(name, label, found, read)
    return Source(name, label, found, lambda: itertools.islice(read(), limit))


def _parsed(name: str) -> tuple[str, str | None, str | None, int | None]:
    """Name, subset, split and number of first rows; a path that exists is only a path."""
    if Path(name).exists():
        return name, None, None, None
    parts = CHOICE.fullmatch(name)
    if parts is None:
        raise ValueError(f"{name!r} is not a source of data; expected SOURCE::SPLIT[:1000]")
    limit = parts["limit"]
    return parts["name"], parts["subset"], parts["split"], None if limit is None else int(limit)


def _folder(path: Path, split: str | None) -> tuple[str, Callable[[], Iterator[Row]]]:
    """The format of a folder's files, and what reads their rows."""
    if any((path / name).exists() for name in SAVED):
        refuse_programs(path)
        chosen, rows = choose_split(tables.saved_splits(path), split, f"{path}::")
        read = lambda: numbered_rows(tables.saved_rows(rows), path)  # noqa: E731
        return _named("a saved dataset", chosen), read
    chosen, files = choose_split(data_files(path), split, f"{path}::")
    kinds = sorted({file_format(file)[0] for file in files})
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    found = _named(f"a folder with {count} of {' and '.join(kinds)}", chosen)
    return found, functools.partial(_chained, files)


def _hub(
    name: str, subset: str | None, split: str | None
) -> tuple[str, Callable[[], Iterator[Row]]]:
    source = f"{name}::{subset}/" if subset else f"{name}::"
    chosen, rows = choose_split(tables.hub_splits(name, subset), split, source)
    found = _named("a dataset of the hub, streamed", chosen)
    where = f"{source}{chosen}"
    return found, lambda: numbered_rows(tables.streamed_rows(rows, where), where)


def _chained(files: list[Path]) -> Iterator[Row]:
    """Rows of several files, numbered consecutively."""
    rows = itertools.chain.from_iterable(map(file_rows, files))
    return (dataclasses.replace(row, number=number) for number, row in enumerate(rows))


def _named(what: str, split: str) -> str:
    return f"{what}, split {split}" if split else what
