"""Files of features: how the rows of a data set are divided among shards, and one shard."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxspec.checkpoints.tensors import read_header, write_tensors
from jaxspec.training.features import Features


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which shard holds which rows; depends only on lengths.

    Attributes:
      shards: indices of the sequences in each shard.
      starts: first row of every sequence in its shard.
      rows: number of rows of each shard.
    """

    shards: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    rows: tuple[int, ...]

    @functools.cached_property
    def shard_of(self) -> dict[int, int]:
        """Shard of each sequence."""
        return {row: i for i, rows in enumerate(self.shards) for row in rows}


@dataclasses.dataclass(frozen=True)
class ShardFormat:
    """Widths of the two arrays, and the dtype of both."""

    hidden: int
    taps: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return (self.hidden + self.taps) * self.dtype.itemsize


def plan_shards(lengths: Sequence[int], shard_rows: int) -> Layout:
    """Assigns sequences, by length, to shards of up to `shard_rows` rows, at least one each.

    >>> plan_shards([5, 2, 3, 4], 6)
    Layout(shards=((1, 2), (3,), (0,)), starts=(0, 0, 2, 0), rows=(5, 4, 5))
    """
    shards, rows, starts = [], [], [0] * len(lengths)
    for i in np.argsort(lengths, kind="stable").tolist():
        if not shards or rows[-1] + lengths[i] > shard_rows:
            shards.append([])
            rows.append(0)
        starts[i] = rows[-1]
        shards[-1].append(i)
        rows[-1] += lengths[i]
    return Layout(tuple(map(tuple, shards)), tuple(starts), tuple(rows))


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a shard atomically and durably."""
    partial = path.with_suffix(".partial")
    write_tensors(partial, tensors)
    with partial.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)


def open_shard(path: Path, rows: int, stored: ShardFormat) -> Features | None:
    """Memory maps of a shard; None if it is missing or incomplete."""
    try:
        entries = read_header(path)
    except ValueError:
        return None
    maps = {}
    for name, width in (("hidden", stored.hidden), ("taps", stored.taps)):
        entry = entries[name]
        if (entry.dtype, entry.shape) != (stored.dtype, (rows, width)):
            return None
        maps[name] = np.memmap(path, entry.dtype, "r", entry.offset, entry.shape)
    return Features(**maps)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05}.safetensors"
