"""Compressed files, recognised by their first bytes rather than their names."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
}
SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[tuple[io.BufferedReader, str | None]]:
    """A file's bytes, decompressed, and the name of the compression (None without one).

    Raises:
      ValueError: the file cannot be read, its compressed data is damaged or cut off, or the
        library for it is not installed; damage may be raised later, while reading.
    """
    try:
        raw = Path(path).open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    with raw:
        try:
            head = raw.peek(8)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        kind = next((x for x, magic in MAGIC.items() if head.startswith(magic)), None)
        if kind is None:
            yield raw, None
            return
        decompress, damage = _decompressor(kind, path)
        try:
            with decompress(raw) as stream:
                yield io.BufferedReader(stream), kind
        except (EOFError, *damage) as error:
            raise ValueError(
                f"{path}: its {kind} data is damaged or cut off ({error}); get the file again"
            ) from error


def without_suffix(name: str) -> str:
    """A file's name without a suffix of compression.

    >>> without_suffix("data.jsonl.gz")
    'data.jsonl'
    """
    return next((name.removesuffix(x) for x in SUFFIXES if name.endswith(x)), name)


def _decompressor(
    kind: str, path: str | Path
) -> tuple[Callable[[BinaryIO], BinaryIO], tuple[type[Exception], ...]]:
    """Opens a compressed stream; and the errors of damaged data, besides EOFError."""
    if kind == "gzip":
        return _gzip, (gzip.BadGzipFile, zlib.error)
    if kind == "bzip2":
        return bz2.BZ2File, (OSError,)
    if kind == "xz":
        return lzma.LZMAFile, (lzma.LZMAError,)
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise ValueError(
            f"{path} is compressed with zstd, which needs a package: pip install backports.zstd"
        ) from error
    return zstd.ZstdFile, (zstd.ZstdError,)


def _gzip(stream: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=stream)
