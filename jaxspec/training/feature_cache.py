"""The frozen target's features of a whole data set, computed once and kept on disk.

A folder holds `index.json`, which identifies the data and the target, and shards
`features-00000.safetensors` with `taps` [R, n * M] and `hidden` [R, M]: the rows of some
sequences, shortest first, concatenated. Shards are written atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.checkpoints.tensors import read_json
from jaxspec.data.conversations import Example
from jaxspec.models.target import Target
from jaxspec.training.batches import Place
from jaxspec.training.feature_build import build_shards
from jaxspec.training.feature_shards import (
    Layout,
    ShardFormat,
    open_shard,
    plan_shards,
    shard_path,
    stored_dtype,
)
from jaxspec.training.features import Features

INDEX = "index.json"
SHARD_BYTES = 256 * 10**6


class FeatureCache:
    """Precomputed features, memory-mapped.

    Args:
      order: which of the stored taps to read, in this order.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        lengths: Sequence[int],
        stored: ShardFormat,
        order: Sequence[int],
    ):
        self._folder, self._layout = folder, layout
        self._lengths, self._format, self._order = lengths, stored, list(order)
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
            np.zeros((*shape, length, len(self._order), stored.hidden), stored.dtype),
        )
        for place in found:
            start, count = (x[place.sequence] for x in (self._layout.starts, self._lengths))
            shard = self._shard(self._layout.shard_of[place.sequence])
            out.hidden[place.of(count)] = shard.hidden[start : start + count]
            tapped = shard.taps[start : start + count].reshape(count, -1, stored.hidden)
            out.taps[place.of(count)] = tapped[:, self._order]
        return Features(out.hidden, out.taps.reshape(*out.hidden.shape[:-1], -1))

    def _shard(self, number: int) -> Features:
        if number not in self._maps:
            path = shard_path(self._folder, number)
            found = open_shard(path, self._layout.rows[number], self._format)
            if found is None:
                raise ValueError(f"{path} was changed or removed; run again to rebuild it")
            self._maps[number] = found
        return self._maps[number]


def open_features(
    folder: str | Path,
    target: Target,
    examples: Sequence[Example],
    *,
    taps: tuple[int, ...],
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FeatureCache:
    """Opens the features of sequences in a folder; missing ones are computed first.

    After an interruption it resumes at the current shard, with the same files as a result.

    Args:
      taps: the folder's, or some of them.
      dtype: storage dtype; by default the folder's, or the target's for a new folder.
      shard_bytes: approximate size of a new folder's files.

    Raises:
      ValueError: the folder belongs to another target or other sequences, or lacks a tap; the
        disk is too small; or shards are missing and there are several processes.
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
    held = tuple(index["taps"])
    stored = ShardFormat(width, len(held) * width, jnp.dtype(index["dtype"]))
    layout = plan_shards(lengths, max(1, index["shard_bytes"] // stored.row_bytes))
    missing = [
        i
        for i, rows in enumerate(layout.rows)
        if open_shard(shard_path(folder, i), rows, stored) is None
    ]
    if missing:
        _check_room(folder, layout, missing, stored)
        build_shards(folder, target, examples, held, layout, missing, stored)
    return FeatureCache(folder, layout, lengths, stored, [held.index(tap) for tap in taps])


def _index(
    folder: Path, settings: dict[str, Any], dtype: str | None, defaults: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a folder: written for a new one, checked against those of an old one."""
    path = folder / INDEX
    asked = settings if dtype is None else settings | {"dtype": dtype}
    if not path.exists():
        index = defaults | asked
        stored_dtype(index["dtype"])
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(index, indent=2) + "\n")
        os.replace(partial, path)
        return index
    index = read_json(path)
    held = index.get("taps")
    if isinstance(held, list) and all(tap in held for tap in settings["taps"]):
        asked = asked | {"taps": held}
    other = [
        f"{name} {index.get(name)!r}, expected {value!r}"
        for name, value in asked.items()
        if index.get(name) != value
    ]
    if other:
        raise ValueError(
            f"{folder} holds features for another setup ({'; '.join(other)}); give --features "
            "another folder"
        )
    return index


def _check_room(
    folder: Path, layout: Layout, missing: Sequence[int], stored: ShardFormat
) -> None:
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


def _digest(examples: Sequence[Example]) -> str:
    """A hash of the tokens of all sequences."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.tokens, "<i4"))
    return digest.hexdigest()
