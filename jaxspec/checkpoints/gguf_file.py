"""A GGUF file: key/values and tensors.

Parsed here because `gguf.GGUFReader` spends three seconds on a vocabulary of 49,152 and maps
the whole file; block formats and their dequantisation are the library's.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
ROWS = 16  # rows dequantised together, if their number allows it


@dataclasses.dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]  # [out, in]: GGUF lists dimensions innermost first
    kind: gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file
    size: int  # bytes


def open_gguf(path: str | Path) -> GgufFile:
    """Opens a file; an unchanged file is parsed only once. Errors as in `GgufFile`.

    Configuration, tokenizer and weights are loaded one after another, and parsing a vocabulary
    takes most of a second.
    """
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return _opened(Path(path), found.st_ino, found.st_size, found.st_mtime_ns)
    return GgufFile(path)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, inode: int, size: int, modified: int) -> GgufFile:
    return GgufFile(path)


class GgufFile:
    """Metadata and tensor directory of a file; tensors are read on demand.

    Attributes:
      metadata: key -> number, bool, string or list.
      shapes: of every tensor, [out, in].

    Raises:
      ValueError: the file does not exist, is not GGUF version 2 or 3, or is cut short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path} does not exist; expected a GGUF file")
        try:
            with open(self.path, "rb") as stream:
                self.metadata, self._entries = _parse(_Cursor(stream, self.path))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a whole GGUF file ({error}); download it again"
            ) from None
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """One tensor, or one of those stacked along its first axis, dequantised to float32
        (float16 stays)."""
        entry = self._entries[name]
        if index is not None:
            count, *shape = entry.shape
            size = entry.size // count
            entry = _Entry(tuple(shape), entry.kind, entry.offset + index * size, size)
        data = np.fromfile(self.path, np.uint8, entry.size, offset=entry.offset)
        row = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)[-1]
        # The library works on 16 rows at a time; blocks are independent of row lengths.
        row *= math.gcd(len(data) // row, ROWS)
        try:
            with np.errstate(all="ignore"):  # scales of a damaged file overflow
                return gguf.dequantize(data.reshape(-1, row), entry.kind).reshape(entry.shape)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor '{name}' is stored as {entry.kind.name}, which the gguf "
                "library cannot dequantise; use another quantisation, such as Q8_0"
            ) from None


class _Cursor:
    """Little-endian values in sequence; never reads past the end."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.size = path.stat().st_size
        mapped = self.size and mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = mapped or b""
        self.position = 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > self.size:
            raise ValueError(f"it ends at byte {self.size}, inside its header")
        return self.data[start : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """`count` strings, read fast, as a vocabulary has 100,000."""
        data, size, found, end = self.data, self.size, [], self.position
        for _ in range(count):
            start = end + 8
            end = start + int.from_bytes(data[end:start], "little")
            if end > size:
                break
            found.append(data[start:end].decode("utf-8"))
        self.position = end
        self.take(0)
        return found

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"its metadata holds a value of unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == STRING:
            return self.strings(count)
        if kind not in SCALARS:
            raise ValueError(f"its metadata holds an array of unknown type {kind}")
        width = struct.calcsize(f"<{SCALARS[kind]}")
        return [x for (x,) in struct.iter_unpack(f"<{SCALARS[kind]}", self.take(count * width))]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; expected 2 or 3, little-endian")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    directory = []
    for _ in range(num_tensors):
        name, rank = cursor.string(), cursor.scalar("I")
        if not 1 <= rank <= 4:
            raise ValueError(f"its tensor '{name}' has {rank} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(rank))[::-1]
        directory.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its 'general.alignment' is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    entries = {}
    for name, shape, kind, offset in directory:
        kind = gguf.GGMLQuantizationType(kind)
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        if start + offset + size > cursor.size:
            raise ValueError(f"it ends at byte {cursor.size}, before tensor '{name}' does")
        if name in entries:
            raise ValueError(f"it holds two tensors named '{name}'")
        entries[name] = _Entry(shape, kind, start + offset, size)
    return metadata, entries
