"""The frozen target's features of a whole data set, computed once and kept on disk.

A folder holds `index.json`, which identifies the data and the target, and shards
`features-00000.safetensors` with `taps` [R, n * M] and `hidden` [R, M]: the rows of some
sequences, shortest first, concatenated. Shards are written atomically, by one process at a
time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.checkpoints.fuse import DTYPES
from jaxspec.checkpoints.tensors import read_json
from jaxspec.data.conversations import Example
from jaxspec.data.identity import fingerprint
from jaxspec.locks import claimed
from jaxspec.models.target import Target
from jaxspec.sharding import any_process, first_process
from jaxspec.training.batches import Place
from jaxspec.training.feature_build import build_shards
from jaxspec.training.feature_shards import (
    Layout,
    ShardFormat,
    open_shard,
    plan_shards,
    shard_path,
)
from jaxspec.training.features import Features
from jaxspec.whole_files import replace_text

INDEX = "index.json"
SHARD_BYTES = 256 * 10**6


class FeatureCache:
    """Features of known sequences in a folder, memory-mapped.

    Args:
      index: the folder's settings.
      lengths: of the sequences.
      width: M.
      taps: which of the folder's to read, in this order.

    Attributes:
      dtype: name of the storage dtype.
    """

    def __init__(
        self,
        folder: Path,
        index: dict[str, Any],
        lengths: Sequence[int],
        width: int,
        taps: Sequence[int],
    ):
        self._folder, self._index, self._lengths = folder, index, lengths
        self._held: tuple[int, ...] = tuple(index["taps"])
        self._order = [self._held.index(tap) for tap in taps]
        self.dtype: str = index["dtype"]
        if self.dtype not in DTYPES:
            raise ValueError(
                f"features cannot be stored in {self.dtype!r}; expected one of {DTYPES}"
            )
        self._format = ShardFormat(width, len(self._held) * width, jnp.dtype(self.dtype))
        rows = max(1, index["shard_bytes"] // self._format.row_bytes)
        self._layout = plan_shards(lengths, rows)
        self._maps: dict[int, Features] = {}

    def complete(self, target: Target, examples: Sequence[Example]) -> None:
        """Computes the missing shards; the first of several processes writes them.

        After an interruption it resumes at the current shard, with the same files as a result.

        Args:
          target, examples: the folder's; several processes need the weights on a mesh of all.

        Raises:
          ValueError: shards are missing, and the disk is too small, or another run writes them.
        """
        layout, stored, leads = self._layout, self._format, jax.process_index() == 0
        lacks = [
            leads and open_shard(shard_path(self._folder, i), rows, stored) is None
            for i, rows in enumerate(layout.rows)
        ]
        missing = np.flatnonzero(first_process(lacks)).tolist()
        if not missing:
            return
        with contextlib.ExitStack() as held:
            if leads:
                remedy = "wait until it is done, or give --features another folder"
                held.enter_context(claimed(self._folder, remedy))
                _check_room(self._folder, layout, missing, stored)
                replace_text(self._folder / INDEX, json.dumps(self._index, indent=2) + "\n")
            build_shards(self._folder, target, examples, self._held, layout, missing, stored)
        any_process(False)  # the others wait until the last shard is written

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
    """Opens the features of sequences in a folder, and writes nothing: see `complete`.

    Args:
      target: every array must be fully addressable in this process.
      taps: the folder's, or some of them.
      dtype: storage dtype; by default the folder's, or the target's for a new folder.
      shard_bytes: approximate size of a new folder's files.

    Raises:
      ValueError: the folder belongs to another target or other sequences, or lacks a tap.
    """
    folder = Path(folder)
    lengths = [len(example) for example in examples]
    computed = str(target.params.embed.dtype)
    settings = {
        "target": target.name,
        "fingerprint": fingerprint(target),
        "target_dtype": computed,
        "taps": list(taps),
        "sequences": len(examples),
        "tokens": sum(lengths),
        "digest": _digest(examples),
    }
    index = _index(folder, settings, dtype, {"dtype": computed, "shard_bytes": shard_bytes})
    return FeatureCache(folder, index, lengths, target.config.hidden_size, taps)


def _index(
    folder: Path, settings: dict[str, Any], dtype: str | None, defaults: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a folder: those of an old one, checked, or those of a new one."""
    path = folder / INDEX
    asked = settings if dtype is None else settings | {"dtype": dtype}
    if not path.exists():
        return defaults | asked
    index = read_json(path)
    # A model may be moved; older folders know it only by its name.
    asked.pop("target" if "fingerprint" in index else "fingerprint")
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
