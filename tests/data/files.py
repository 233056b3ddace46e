"""Rows of data in every format, and libraries that some of them need."""

import bz2
import gzip
import importlib.util
import json
import lzma

import pytest

from jaxspec.data.sources import open_source
from tests.data.test_conversations import TALK

SHAREGPT = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]
ROWS = [{"messages": TALK[:2]}, {"messages": TALK}]


def needs(*names):
    """Skips a test where one of these libraries is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def zstd(data: bytes) -> bytes:
    try:
        from compression import zstd
    except ImportError:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data)


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_parquet(rows) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nothing = arrow.table({"messages": arrow.array([], arrow.string())})
    table = arrow.Table.from_pylist(rows) if rows else nothing
    sink = arrow.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=1)
    return sink.getvalue().to_pybytes()


FILES = {
    "JSON lines": (".jsonl", as_lines),
    "a JSON array": (".json", as_array),
    "parquet": (".parquet", as_parquet),
}
COMPRESSIONS = {
    "": ("", bytes),
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
    "zstd": (".zst", zstd),
}


def write(path, kind, rows):
    """The path, of a file without a suffix, in which the rows are."""
    path.write_bytes(FILES[kind][1](rows))
    return path


def contents(source):
    """The rows of a source as it reads them."""
    return [row.fields for row in open_source(source)]


def folder_of(path, files):
    """A folder of files with the given bytes."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def saved(rows, path):
    """A dataset as `datasets` saves it."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path
