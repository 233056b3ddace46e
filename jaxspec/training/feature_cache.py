"""The frozen target's features of a whole data set, computed once and kept on disk.

A folder holds `index.json`, which identifies the data and the target, and shards
`features-00000.safetensors` of `taps` [R, n * M] and `hidden` [R, M]: the rows of some
sequences, shortest first, one after another. Each shard appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxspec.checkpoints.tensors import DTYPES, read_json
from jaxspec.config import TargetConfig
from jaxspec.data.conversations import Example
from jaxspec.models.params import TargetParams
from jaxspec.models.target import Target
from jaxspec.sharding import DATA, mesh_of
from jaxspec.training.batches import UNIT, BatchRows, Place, bucket, collate, places
from jaxspec.training.features import Features, target_features

INDEX = "index.json"
SHARD_BYTES = 256 * 10**6
BATCH_TOKENS = 8192  # of one forward of the target


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which shard holds which rows; follows from lengths alone.

    Attributes:
      shards: indices of the sequences in each.
      starts: first row of every sequence in its shard.
      rows: of each shard.
    """

    shards: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    rows: tuple[int, ...]

    @functools.cached_property
    def shard_of(self) -> dict[int, int]:
        """Sequence to shard."""
        return {row: i for i, rows in enumerate(self.shards) for row in rows}


class FeatureCache:
    """Features that were computed before, read by memory map."""

    def __init__(self, folder: Path, layout: Layout, lengths: Sequence[int], stored: _Format):
        self._folder, self._layout = folder, layout
        self._lengths, self._format = lengths, stored
        self._maps: dict[int, Features] = {}

    def read(self, length: int, shape: tuple[int, int], found: Sequence[Place]) -> Features:
        """Features of a batch, zeros where there is no sequence.

        Args:
          length: T.
          shape, found: from `places`.

        Returns:
          Host arrays [n, b, T, ...] in the dtype they are stored in.
        """
        stored = self._format
        out = Features(
            np.zeros((*shape, length, stored.hidden), stored.dtype),
            np.zeros((*shape, length, stored.taps), stored.dtype),
        )
        for place in found:
            start, count = (x[place.sequence] for x in (self._layout.starts, self._lengths))
            shard = self._shard(self._layout.shard_of[place.sequence])
            out.hidden[place.of(count)] = shard.hidden[start : start + count]
            out.taps[place.of(count)] = shard.taps[start : start + count]
        return out

    def _shard(self, number: int) -> Features:
        if number not in self._maps:
            path = _path(self._folder, number)
            found = _open(path, self._layout.rows[number], self._format)
            if found is None:
                raise ValueError(f"{path} was changed or removed; start again to rebuild it")
            self._maps[number] = found
        return self._maps[number]


@dataclasses.dataclass(frozen=True)
class _Format:
    """Widths of the two arrays, and the dtype of both."""

    hidden: int
    taps: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return (self.hidden + self.taps) * self.dtype.itemsize


def open_features(
    folder: str | Path,
    target: Target,
    examples: Sequence[Example],
    *,
    taps: tuple[int, ...],
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FeatureCache:
    """The features of sequences, from a folder; missing ones are computed first.

    After an interruption it resumes at the current shard; the files come out the same.

    Args:
      dtype: they are stored in; that of the folder, or for a new one the target's, by default.
      shard_bytes: size of a new folder's files, about.

    Raises:
      ValueError: the folder is of another target, other taps or other sequences; the disk is
        too small; or shards are missing and several processes would write them.
    """
    folder = Path(folder)
    lengths = [len(example) for example in examples]
    computed = str(target.params.embed.dtype)
    width = target.config.hidden_size
    settings = {
        "target": target.name,
        "target_dtype": computed,
        "taps": list(taps),
        "sequences": len(examples),
        "tokens": sum(lengths),
        "digest": _digest(examples),
    }
    index = _index(folder, settings, dtype, {"dtype": computed, "shard_bytes": shard_bytes})
    stored = _Format(width, len(taps) * width, jnp.dtype(index["dtype"]))
    layout = plan_shards(lengths, max(1, index["shard_bytes"] // stored.row_bytes))
    missing = [
        i for i, rows in enumerate(layout.rows) if _open(_path(folder, i), rows, stored) is None
    ]
    if missing:
        _check_room(folder, layout, missing, stored)
        _build(folder, target, examples, taps, layout, missing, stored)
    return FeatureCache(folder, layout, lengths, stored)


def plan_shards(lengths: Sequence[int], shard_rows: int) -> Layout:
    """Sequences by length, as many to a shard as fit its rows, at least one.

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


def _index(
    folder: Path, settings: dict[str, Any], dtype: str | None, defaults: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a folder: written for a new one, checked against those of an old one."""
    path = folder / INDEX
    asked = settings if dtype is None else settings | {"dtype": dtype}
    if not path.exists():
        index = defaults | asked
        _kind_of(index["dtype"])
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(index, indent=2) + "\n")
        os.replace(partial, path)
        return index
    index = read_json(path)
    other = [
        f"{name} {index.get(name)!r}, expected {value!r}"
        for name, value in asked.items()
        if index.get(name) != value
    ]
    if other:
        raise ValueError(
            f"{folder} holds features of something else ({'; '.join(other)}); give --features "
            "another folder"
        )
    return index


def _kind_of(dtype: str) -> str:
    """A dtype's name in safetensors."""
    kinds = {str(np.dtype(x)): kind for kind, x in DTYPES.items()}
    if dtype not in kinds:
        raise ValueError(f"features cannot be stored in {dtype!r}; expected one of {[*kinds]}")
    return kinds[dtype]


def _check_room(folder: Path, layout: Layout, missing: Sequence[int], stored: _Format) -> None:
    """Prints the size of the shards to build; raises ValueError if the disk is too small."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(layout.rows)} shards, which several "
            "processes cannot build together; run one process on the same data first"
        )
    whole = sum(layout.rows) * stored.row_bytes
    needed = sum(layout.rows[i] for i in missing) * stored.row_bytes
    free = shutil.disk_usage(folder).free
    print(
        f"{folder}: features of {sum(layout.rows):,} tokens, {whole / 1e9:.2f} GB "
        f"({needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free)",
        file=sys.stderr,
    )
    if needed >= free:
        raise ValueError(
            f"{folder} needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB; "
            "train without --features, on fewer conversations, or store bfloat16"
        )


def _build(
    folder: Path,
    target: Target,
    examples: Sequence[Example],
    taps: tuple[int, ...],
    layout: Layout,
    missing: Sequence[int],
    stored: _Format,
) -> None:
    total = sum(layout.rows)
    todo = sum(layout.rows[i] for i in missing)
    with tqdm(
        total=total,
        initial=total - todo,
        desc="features",
        unit="token",
        unit_scale=True,
        file=sys.stderr,
    ) as progress:
        for number in missing:
            rows = layout.rows[number]
            hidden = np.empty((rows, stored.hidden), stored.dtype)
            tapped = np.empty((rows, stored.taps), stored.dtype)
            for row, features in _computed(target, examples, taps, layout.shards[number]):
                start, count = layout.starts[row], len(examples[row])
                hidden[start : start + count] = features.hidden[:count]
                tapped[start : start + count] = features.taps[:count]
                progress.update(count)
            _write(_path(folder, number), {"hidden": hidden, "taps": tapped})


def _computed(
    target: Target, examples: Sequence[Example], taps: tuple[int, ...], rows: Sequence[int]
) -> Iterator[tuple[int, Features]]:
    """Every sequence's features, padded, in the order of `rows`, which is by length.

    A batch is computed while the one before is copied and written.
    """
    lengths, before = [len(example) for example in examples], None
    with mesh_of(target.params) as mesh:
        for batch in _batches(lengths, rows, mesh):
            shape, found = places(batch, lengths, micro_batch=len(batch.rows))
            tokens = collate(examples, batch.length, shape, found)[0][0]
            if mesh is not None:
                tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(DATA)))
            features = _features(target.params, target.config, tokens, taps)
            if before is not None:
                yield from _split(*before)
            before = batch, features
    yield from _split(*before)


def _batches(lengths: Sequence[int], rows: Sequence[int], mesh) -> Iterator[BatchRows]:
    """Powers of two of sequences of a bucket, so that few shapes are compiled."""
    divide = 1 if mesh is None else mesh.shape[DATA]
    for length, group in itertools.groupby(rows, key=lambda row: bucket(lengths[row])):
        waiting = [(row,) for row in group]
        most = max(1, BATCH_TOKENS // length)
        while waiting:
            size = 1 << (min(most, len(waiting)).bit_length() - 1)
            taken, waiting = waiting[:size], waiting[size:]
            padding = [()] * (-size % divide)
            yield BatchRows((*taken, *padding), length)


def _split(batch: BatchRows, features: Features) -> Iterator[tuple[int, Features]]:
    features = jax.device_get(features)
    for i, row in enumerate(batch.rows):
        for sequence in row:
            yield sequence, Features(features.hidden[i], features.taps[i])


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def _features(
    params: TargetParams, config: TargetConfig, tokens: jax.Array, taps: tuple[int, ...]
) -> Features:
    return target_features(params, config, tokens, taps=taps, chunk=UNIT)


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Whole or not at all, also when the machine goes down."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    with partial.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _open(path: Path, rows: int, stored: _Format) -> Features | None:
    """Memory maps of a shard, or None if it is not there or not whole."""
    if not path.exists():
        return None
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        if header + 8 > size:
            return None
        try:
            entries = json.loads(stream.read(header))
        except ValueError:
            return None
    maps = {}
    for name, width in (("hidden", stored.hidden), ("taps", stored.taps)):
        begin, end = entries[name]["data_offsets"]
        as_expected = {"dtype": _kind_of(str(stored.dtype)), "shape": [rows, width]}
        if entries[name] != as_expected | {"data_offsets": [begin, end]}:
            return None
        if 8 + header + end > size:
            return None
        maps[name] = np.memmap(path, stored.dtype, "r", 8 + header + begin, (rows, width))
    return Features(**maps)


def _path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05}.safetensors"


def _digest(examples: Sequence[Example]) -> str:
    """Of the tokens of all sequences."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.tokens, "<i4"))
    return digest.hexdigest()
