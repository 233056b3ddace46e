"""Rows of parquet files and of Hugging Face datasets, through `pyarrow` and `datasets`."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.data.compression import opened

PARQUET_MAGIC = b"PAR1"
BATCH = 1024  # rows decoded at a time


def parquet_rows(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    """Rows of a parquet file, which may be compressed as a whole; or the error of a row.

    Raises:
      ValueError: the file is damaged, or `pyarrow` is not installed.
    """
    parquet, arrow = _library("pyarrow.parquet", path), _library("pyarrow", path)
    with opened(path) as (stream, compression):
        if compression is None:
            yield from _parquet_rows(parquet, arrow, stream, path)
            return
        with tempfile.TemporaryFile() as whole:  # parquet readers seek to the end first
            shutil.copyfileobj(stream, whole)
            yield from _parquet_rows(parquet, arrow, whole, path)


def _parquet_rows(parquet, arrow, stream, path) -> Iterator[dict[str, Any] | ValueError]:
    count = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(BATCH):
            for row in _decoded(batch):
                yield row
                count += 1
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged after row {count - 1} ({error}); get the file again"
            if count
            else f"{path} is not a parquet file that can be read ({error})"
        ) from error


def _decoded(batch) -> list[dict[str, Any] | ValueError]:
    """The rows of a batch; one by one if some cannot be decoded, such as text that is not UTF-8
    or a date after the year 9999."""
    try:
        return [without_nulls(row) for row in batch.to_pylist()]
    except Exception as error:
        if len(batch) == 1:
            return [_undecoded(error)]
        return [row for i in range(len(batch)) for row in _decoded(batch.slice(i, 1))]


def _undecoded(error: Exception) -> ValueError:
    return ValueError(f"the row cannot be decoded ({_line(error)})")


def saved_splits(folder: Path) -> Mapping[str, Sequence[dict[str, Any]]]:
    """The splits of a folder that `Dataset.save_to_disk` wrote; "" where it has none.

    Raises:
      ValueError: it cannot be read, or `datasets` is not installed.
    """
    datasets = _datasets(folder)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"cannot read the saved dataset {folder}: {_line(error)}") from error
    return found if isinstance(found, Mapping) else {"": found}


def hub_splits(name: str, subset: str | None) -> Mapping[str, Iterable[dict[str, Any]]]:
    """The splits of a dataset on the Hugging Face hub, whose rows are streamed.

    Args:
      name: "owner/name".
      subset: configuration of the dataset; None where it has only one.

    Raises:
      ValueError: it cannot be found or read, or `datasets` is not installed.
    """
    datasets = _datasets(name)
    try:
        return datasets.load_dataset(name, subset, streaming=True)
    except Exception as error:
        raise ValueError(
            f"{name} is not a local file or folder, and cannot be read as a dataset of the "
            f"Hugging Face hub ({_line(error)}); choose a subset by {name}::SUBSET/SPLIT"
        ) from error


def saved_rows(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any] | ValueError]:
    """Rows of a split of a saved dataset; or the error of a row."""
    for number in range(len(rows)):  # an iterator would end at an error
        try:
            row = without_nulls(rows[number])
        except Exception as error:
            row = _undecoded(error)
        yield row


def streamed_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Rows of a split of a dataset on the hub.

    Raises:
      ValueError: a row cannot be decoded or fetched; later rows are then lost too.
    """
    rows, count = iter(rows), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{name}: row {count} cannot be read ({_line(error)})") from error
        yield without_nulls(row)
        count += 1


def without_nulls(value: Any) -> Any:
    """Removes null values, which a typed table has where a JSON row would lack the key.

    >>> without_nulls({"messages": [{"role": "user", "content": "Hi", "name": None}]})
    {'messages': [{'role': 'user', 'content': 'Hi'}]}
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [without_nulls(x) for x in value]
    return value


def _datasets(source: Any):
    datasets = _library("datasets", source)
    major = int(datasets.__version__.split(".")[0])
    if major < 4:
        raise ValueError(
            f"datasets {datasets.__version__} may run a dataset's own code; expected version 4 "
            "or newer: pip install --upgrade datasets"
        )
    return datasets


def _library(name: str, source: Any):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f"reading {source} needs {package}: pip install {package}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
