"""Fills a feature cache: runs the target over the sequences whose shards are missing."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxspec.config import TargetConfig
from jaxspec.data.conversations import Example
from jaxspec.models.params import TargetParams
from jaxspec.models.target import Target
from jaxspec.sharding import DATA, mesh_of
from jaxspec.training.batches import UNIT, BatchRows, bucket, collate, places
from jaxspec.training.feature_shards import Layout, ShardFormat, shard_path, write_shard
from jaxspec.training.features import Features, target_features
from jaxspec.training.sharding import gather

BATCH_TOKENS = 8192  # of one forward of the target


def build_shards(
    folder: Path,
    target: Target,
    examples: Sequence[Example],
    taps: tuple[int, ...],
    layout: Layout,
    missing: Sequence[int],
    stored: ShardFormat,
) -> None:
    """Computes the missing shards; the first process writes them, with a progress bar."""
    leads = jax.process_index() == 0
    total = sum(layout.rows)
    todo = sum(layout.rows[i] for i in missing)
    with tqdm(
        total=total,
        initial=total - todo,
        desc="features",
        unit="token",
        unit_scale=True,
        file=sys.stderr,
        disable=not leads,
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
            if leads:
                write_shard(shard_path(folder, number), {"hidden": hidden, "taps": tapped})


def _computed(
    target: Target, examples: Sequence[Example], taps: tuple[int, ...], rows: Sequence[int]
) -> Iterator[tuple[int, Features]]:
    """Every sequence's padded features, in the order of `rows`, which is by length.

    A batch is computed while the previous one is copied and written.
    """
    lengths, before = [len(example) for example in examples], None
    with mesh_of(target.params) as mesh:
        for batch in _batches(lengths, rows, mesh):
            shape, found = places(batch, lengths, micro_batch=len(batch.rows))
            tokens = collate(examples, batch.length, shape, found)[0][0]
            if mesh is not None:
                tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(DATA)))
            features = gather(mesh, _features(target.params, target.config, tokens, taps))
            if before is not None:
                yield from _split(*before)
            before = batch, features
    yield from _split(*before)


def _batches(lengths: Sequence[int], rows: Sequence[int], mesh) -> Iterator[BatchRows]:
    """Batches of a bucket's sequences, with power-of-two sizes, so that few shapes compile."""
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
